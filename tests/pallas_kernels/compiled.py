"""Compiles Triton kernels for GPUs that are not here, and reads back what they take."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "int32": "*i32", "uint16": "*u16"}
_POINTERS |= {"int8": "*i8"}

REGISTERS = 65536  # of a multiprocessor
SHARED = {80: 164 * 1024, 90: 228 * 1024}  # bytes of a multiprocessor's shared memory
_RESERVED = 1024  # of which the driver takes so much for every program

# Options of the Triton compiler that its version may change.
_OPTIONS = {"enable_fp_fusion": True}


class Usage(NamedTuple):
    """What a program of a kernel takes."""

    registers: int  # per thread
    shared: int  # bytes
    spilled: int  # bytes of stack and local memory per thread
    ptx: str

    def resident(self, warps, capability):
        """Programs that fit on a multiprocessor."""
        registers = -(-self.registers // 8) * 8 * 32 * warps  # given out in eights to each warp
        return min(REGISTERS // registers, SHARED[capability] // (self.shared + _RESERVED))


def compile_kernel(kernel, dtypes, constants, *, warps, stages, capability, **options):
    """Compiles one variant down to machine code.

    Args:
        kernel: decorated with `triton.jit`.
        dtypes: of the arrays, by parameter.
        constants: values of the other parameters.
        warps, stages: as in the settings of the kernels.
        capability: 80 or 90.
        options: other options of the compiler.
    """
    names = kernel.arg_names
    assert set(names) == set(dtypes) | set(constants)
    source = ASTSource(
        kernel,
        {name: _POINTERS[dtypes[name]] if name in dtypes else "constexpr" for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in dtypes},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages, **_OPTIONS, **options},
    )
    report = _cuobjdump("-res-usage", compiled.asm["cubin"])
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Usage(
        found["REG"],
        compiled.metadata.shared,
        found["STACK"] + found["LOCAL"],
        compiled.asm["ptx"],
    )


def _cuobjdump(option, cubin):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return run.stdout
