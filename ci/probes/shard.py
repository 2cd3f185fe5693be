"""Prints which elements of range(64) fall to this process's rank."""

import json
import sys

import tensorflow as tf
from absl import flags

from common import npu_config

npu_config.define_flags()
flags.FLAGS(sys.argv)
runtime = npu_config.setup()
share = tf.data.Dataset.range(64).shard(runtime.size, runtime.rank)
elements = [int(element) for element in share]
print(json.dumps({"rank": runtime.rank, "elements": elements}))
