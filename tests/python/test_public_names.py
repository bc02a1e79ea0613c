"""Every name of the released package and of its description of itself: here with the same parameters, or listed with
the reason. tests/golden/public_names.py made the list of names."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
import public_names

# By reason: names that are not here, or not as they are there.
DIFFERENCES = {
    "there is no library for these devices; a backend of another package registers its operators": """
        backends.hpu backends.hpu.ops backends.mps backends.mps.ops backends.triton backends.xpu backends.xpu.ops
        backends.utils.get_gaudi_sw_version cextension.get_xpu_bnb_library_path
        cextension.XpuBNBNativeLibrary cextension.XpuBNBNativeLibrary.__getattr__
        cextension.XpuBNBNativeLibrary.__getitem__ cextension.XpuBNBNativeLibrary.__init__
        cextension.XpuBNBNativeLibrary.compiled_with_cuda
    """,
    "one library serves all versions of CUDA: there is none to choose by its version": """
        cextension._find_cuda_libs cextension._split_cuda_version cextension.get_available_cuda_binary_versions
        cextension.parse_cuda_version
    """,
    "one sentence says what is wrong, so that there are no parts to put together": """
        cextension.ErrorHandlerMockBNBNativeLibrary._format_dependency_error
        cextension.ErrorHandlerMockBNBNativeLibrary._format_lib_error_message
    """,
    "a forward keeps what it read by itself; torch's cache, which these switch, is left alone": """
        nn.parametrize._enable_parametrization_cache nn.parametrize._disable_parametrization_cache
    """,
    "parts of what is printed, or imports of names that are elsewhere": """
        diagnostics.cuda._print_cuda_diagnostics diagnostics.cuda._print_hip_diagnostics
        diagnostics.cuda.get_cuda_bnb_library_path diagnostics.main.PACKAGE_GITHUB_URL diagnostics.main.bnb_version
        diagnostics.main.print_dedented
    """,
    "it takes arguments of the command line, for --json": "diagnostics.main.main",
    "it is inherited from object; __reduce_ex__ does the work": "nn.modules.Params4bit.__getstate__",
    "states are made in one place": """
        optim.ademamix.AdEMAMix._get_state_double_buffer optim.ademamix.AdEMAMix8bit._get_state_double_buffer
        optim.ademamix.PagedAdEMAMix._get_state_double_buffer
        optim.ademamix.PagedAdEMAMix8bit._get_state_double_buffer
    """,
    "an import of utils.sync_gpu, which is there": "optim.optimizer.sync_gpu",
    "the release has max_unorm where the description has percentile_clipping and block_wise: these go by name": """
        optim.optimizer.Optimizer1State optim.optimizer.Optimizer2State
    """,
    "the release has the parameters that are here, the description others": """
        functional._convert_weight_packed_for_cpu_inverse functional.int8_mm_dequant
    """,
}
# What optimizers take beside the parameters of the release: options of the releases before it, by name alone.
EARLIER = ", *, percentile_clipping=100, block_wise=True"


def differences() -> Iterator[str]:
    for (source, key), text in public_names.read_names().items():
        here = public_names.look_up(key)
        if here is None:
            yield key
        elif text.startswith("accepts"):
            if not public_names.accepts(key, text.split()[1:]):
                yield key
        elif source == "released" and text != here.replace(EARLIER, ""):
            yield key


def test_names_are_here_or_listed() -> None:
    listed = [key for keys in DIFFERENCES.values() for key in keys.split()]
    assert len(listed) == len(set(listed))
    found = set(differences())
    missing, stale = found - set(listed), set(listed) - found
    there = {key: text for (_, key), text in public_names.read_names().items()}
    text = [f"{key}: {there[key]}, here {public_names.look_up(key)}" for key in missing]
    assert not missing, "\n".join(sorted(text))
    assert not stale, f"listed, but there is no difference any more: {sorted(stale)}"


def test_the_comparison_sees_differences() -> None:
    """A name, a default, an order, a base class that is not there."""
    assert public_names.look_up("functional.no_such_name") is None
    assert public_names.look_up("nn.modules.Linear4bit.no_such_method") is None
    assert public_names.look_up("functional.int8_vectorwise_quant") == "(A, threshold=0.0)"
    assert public_names.look_up("nn.modules.LinearNF4") == "class(Linear, Linear4bit, Module)"
    assert public_names.accepts("functional.quantize_4bit", ["A", "blocksize"])
    assert not public_names.accepts("functional.quantize_4bit", ["blocksize", "A"])
    assert len(public_names.read_names()) > 1100
