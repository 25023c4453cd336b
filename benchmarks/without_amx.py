"""Another benchmark as it runs where the processor has no AMX: runtimes then take the kernels that they have for AVX-512 and VNNI.

    python benchmarks/without_amx.py benchmarks/onnx_files.py --images 500

Linux lets a process use AMX's tiles only if it asks; a seccomp filter, which the process and all that it starts inherit, refuses. Nothing
else changes: clock, caches and memory are those of a processor with AMX.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

ARCH_PRCTL, ASK_FOR_FEATURE, TILES = 158, 0x1023, 18  # asm/unistd_64.h, asm/prctl.h: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2  # linux/prctl.h, linux/seccomp.h
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h
REFUSE, ALLOW = 0x00050001, 0x7FFF0000  # with EPERM; linux/seccomp.h
NUMBER_AT, ARGUMENT_AT = 0, 16  # offsets in seccomp_data


class Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def refuse_tiles() -> None:
    """Let this process and its children never use AMX.

    Raises:
        OSError: if the system does not take the filter, or grants the tiles nevertheless.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    steps = (
        (LOAD, 0, 0, NUMBER_AT),
        (JUMP_IF_EQUAL, 0, 3, ARCH_PRCTL),
        (LOAD, 0, 0, ARGUMENT_AT),
        (JUMP_IF_EQUAL, 0, 1, ASK_FOR_FEATURE),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = Program(len(steps), ctypes.addressof(code))
    if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(SECCOMP, FILTER, ctypes.byref(program)):
        raise OSError(ctypes.get_errno(), "the filter was not taken")
    if libc.syscall(ARCH_PRCTL, ASK_FOR_FEATURE, TILES) == 0:
        raise OSError("AMX is granted all the same")


def main() -> None:
    """Run the command that the arguments name, with this Python."""
    if platform.system() != "Linux" or platform.machine() != "x86_64" or len(sys.argv) < 2:
        raise SystemExit(__doc__)
    refuse_tiles()
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


if __name__ == "__main__":
    main()
