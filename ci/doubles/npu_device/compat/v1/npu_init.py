"""Place of the adapter's TensorFlow 1 names; the double offers none."""
