"""The option objects: unknown names and illegal values fail at assignment."""

import warnings

from npu_device._state import record, state

_SWITCH = [True, False]

# Each option: its default and, unless it is free-form, its legal values.
_DUMP = {
    "enable_dump": (False, _SWITCH),
    "dump_path": (None, None),
    "dump_step": (None, None),
    "dump_mode": ("output", ["input", "output", "all"]),
    "enable_dump_debug": (False, _SWITCH),
    "dump_debug_mode": (
        "all",
        ["aicore_overflow", "atomic_overflow", "all"],
    ),
    "dump_data": ("tensor", ["tensor", "stats"]),
    "dump_layer": (None, None),
}
_PROFILING = {
    "enable_profiling": (False, _SWITCH),
    "profiling_options": (None, None),
}
_AOE = {
    "aoe_mode": (None, ["1", "2", "4"]),
    "work_path": ("./", None),
    "aoe_config_file": (None, None),
}
_MEMORY = {
    "atomic_clean_policy": (0, [0, 1]),
    "static_memory_policy": (0, [0, 1, 2, 3, 4]),
    "variable_use_1g_huge_page": (0, [0, 1, 2]),
}
_RECOMPUTE = {"recompute": ("manual", ["auto", "manual"])}
_TOP = {
    "precision_mode": (
        None,
        [
            "force_fp32",
            "allow_fp32_to_fp16",
            "force_fp16",
            "must_keep_origin_dtype",
            "allow_mix_precision",
            "cube_fp16in_fp32out",
            "allow_mix_precision_fp16",
            "allow_mix_precision_bf16",
            "allow_fp32_to_bf16",
        ],
    ),
    "precision_mode_v2": (
        None,
        [
            "fp16",
            "origin",
            "cube_fp16in_fp32out",
            "mixed_float16",
            "mixed_bfloat16",
            "cube_hif8",
            "mixed_hif8",
        ],
    ),
    "graph_run_mode": (1, [0, 1]),
    "deterministic": (0, [0, 1]),
    "modify_mixlist": (None, None),
    "op_precision_mode": (None, None),
    "customize_dtypes": (None, None),
    "fusion_switch_file": (None, None),
    "op_debug_config": (None, None),
    "op_select_implmode": (None, ["high_performance", "high_precision"]),
    "optypelist_for_implmode": (None, None),
    "variable_format_optimize": (None, _SWITCH),
    "op_debug_level": (None, [0, 1, 2, 3, 4]),
    "graph_memory_max_size": (None, None),
    "variable_memory_max_size": (None, None),
    "jit_compile": ("auto", ["true", "false", "auto"]),
    "compile_dynamic_mode": (False, _SWITCH),
    "shape_generalization_mode": (
        "STRICT",
        ["STRICT", "FULL", "ADAPTIVE"],
    ),
    "ac_parallel_enable": ("0", ["0", "1"]),
    "all_tensor_not_empty": (False, _SWITCH),
    "enable_exception_dump": (2, [0, 1, 2]),
    "overflow_flag": (1, [0, 1]),
    "debug_dir": (None, None),
    "export_compile_stat": (1, [0, 1, 2]),
    "op_compiler_cache_mode": ("enable", ["enable", "disable", "force"]),
    "op_compiler_cache_dir": (None, None),
    "graph_compiler_cache_dir": (None, None),
    "hcom_parallel": (True, _SWITCH),
    "hcom_multi_mode": (False, _SWITCH),
    "is_tailing_optimization": (False, _SWITCH),
    "stream_max_parallel_num": (None, None),
    "enable_small_channel": (False, _SWITCH),
    "enable_scope_fusion_passes": (None, None),
    "topo_sorting_mode": (None, [0, 1]),
    "stream_sync_timeout": (-1, None),
    "event_sync_timeout": (-1, None),
    "graph_exec_timeout": (None, None),
    "execute_times": (None, None),
    "external_weight": (False, _SWITCH),
    "input_fusion_size": (131072, None),
    "input_batch_cpy": (False, _SWITCH),
    "aicore_num": (None, None),
    "oo_level": ("O3", ["O0", "O1", "O2", "O3"]),
    "oo_constant_folding": (True, _SWITCH),
    "quant_dumpable": ("0", ["0", "1"]),
    "auto_multistream_parallel_mode": (None, None),
    "optimization_switch": (None, None),
}
_DEPRECATED = (
    "variable_format_optimize",
    "op_select_implmode",
    "optypelist_for_implmode",
    "op_debug_level",
)


class OptionValue:
    """One option: what it is, what it may be, and whether it was set."""

    def __init__(self, default, legal):
        self._default = default
        self._legal = legal
        self._value = default

    def assign(self, value):
        """Stores a legal value; any other raises."""
        if self._legal is not None and value not in self._legal:
            wanted, found = type(self._default), type(value)
            # The adapter tells a wrong type apart from a wrong value.
            if self._default is not None and wanted is not found:
                raise TypeError(
                    f"Expected {wanted.__name__}, got {found.__name__}"
                )
            raise ValueError(f"'{value}' not in optional list {self._legal}")
        self._value = value

    @property
    def value(self):
        """The value as the graph engine receives it: a string or None."""
        if self._value is None:
            return None
        # The engine knows "1" and "0", and not "True".
        if isinstance(self._value, bool):
            return str(int(self._value))
        return str(self._value)


class _Config:
    """A strict set of options and sub-configs."""

    def __init__(self, options, groups=None):
        fields = {name: OptionValue(*rule) for name, rule in options.items()}
        fields.update(groups or {})
        # Past __setattr__ of this class, which reads _fields.
        object.__setattr__(self, "_fields", fields)

    def __getattr__(self, name):
        return self._field(name)

    def __setattr__(self, name, value):
        if state.handle is not None:
            record("late_option", name, value)
            warnings.warn(f"Option {name} set after open()", stacklevel=2)
        field = self._field(name)
        if isinstance(field, OptionValue):
            field.assign(value)
        else:
            self._fields[name] = value

    def _field(self, name):
        if name not in self._fields:
            raise ValueError(
                f"{type(self).__name__} has no option {name}, "
                f"all options {sorted(self._fields)}"
            )
        return self._fields[name]

    def as_dict(self):
        """Returns the options that are set, sub-configs flattened."""
        flat = {}
        for name, field in self._fields.items():
            if isinstance(field, _Config):
                flat.update(field.as_dict())
            elif field.value is not None:
                flat[name] = field.value
                if name in _DEPRECATED:
                    # Printed and not warned, as the adapter does.
                    print(
                        f"[warning][tf_adapter] Option '{name}' is "
                        "deprecated and will be removed in future version"
                    )
        return flat


class NpuDumpConfig(_Config):
    """Data dump and overflow detection."""


class NpuProfilingConfig(_Config):
    """Profiling."""


class NpuAoeConfig(_Config):
    """Automatic tuning."""


class MemoryConfig(_Config):
    """Memory policies."""


class NpuExperimentalConfig(_Config):
    """Options under trial."""


class GraphMemoryOptimizeConfig(_Config):
    """Recomputation."""


class NpuConfig(_Config):
    """All options of one process."""


class NpuRunContextOptions(_Config):
    """Options of npu_run_context()."""


def _experimental():
    graph_memory = GraphMemoryOptimizeConfig(_RECOMPUTE)
    return NpuExperimentalConfig(
        {}, {"graph_memory_optimize_config": graph_memory}
    )


def run_context_options():
    """Returns fresh options for npu_run_context()."""
    return NpuRunContextOptions({}, {"experimental": _experimental()})


def new_options():
    """Returns the options of a process that has set none."""
    groups = {
        "dump_config": NpuDumpConfig(_DUMP),
        "profiling_config": NpuProfilingConfig(_PROFILING),
        "aoe_config": NpuAoeConfig(_AOE),
        "memory_config": MemoryConfig(_MEMORY),
        "experimental": _experimental(),
    }
    return NpuConfig(_TOP, groups)
