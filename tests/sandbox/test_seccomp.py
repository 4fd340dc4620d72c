import platform
import struct

import pytest

from flowrl_kernels.trainer.sandbox import seccomp

ALLOW, KILL = 0x7FFF0000, 0x80000000
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def decide(machine, call, *args, arch=None):
    """What the kernel would make of a call: a reader of BPF that knows the four instructions of the filter."""
    data = struct.pack("=IIQ6Q", call, MACHINES[machine] if arch is None else arch, 0, *args, *[0] * (6 - len(args)))
    code = list(struct.iter_unpack("=HBBI", seccomp.program(machine)))
    at = loaded = 0
    while True:
        operation, if_true, if_false, value = code[at]
        at += 1
        if operation == 0x20:
            loaded = int.from_bytes(data[value : value + 4], "little")
        elif operation == 0x06:
            return value
        else:
            true = loaded == value if operation == 0x15 else loaded & value
            at += if_true if true else if_false


# from the kernel's tables, a second time: read, write, openat, mmap, exit_group, futex, execve
HARMLESS = {"x86_64": (0, 1, 257, 9, 231, 202, 59), "aarch64": (63, 64, 56, 222, 94, 98, 221)}
# ptrace, mount, keyctl, bpf, userfaultfd, perf_event_open, io_uring_setup, unshare, setns, kexec_load, memfd_create,
# process_vm_writev, socket, pidfd_getfd, clone3, inotify_add_watch, shmget, setuid, open_by_handle_at
HARMFUL = {
    "x86_64": (101, 165, 250, 321, 323, 298, 425, 272, 308, 246, 319, 311, 41, 438, 435, 254, 29, 105, 304),
    "aarch64": (117, 40, 219, 280, 282, 241, 425, 97, 268, 104, 279, 271, 198, 438, 435, 27, 194, 146, 265),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_what_python_needs_is_allowed_and_what_opens_doors_is_not(machine):
    assert {decide(machine, call) for call in HARMLESS[machine]} == {ALLOW}
    assert {decide(machine, call) for call in HARMFUL[machine]} == {0x50000 | 38}  # ENOSYS


@pytest.mark.parametrize("machine", MACHINES)
def test_calls_that_no_kernel_has_yet_are_refused(machine):
    assert {decide(machine, call) for call in range(450, 2000)} == {0x50000 | 38}


@pytest.mark.parametrize(("machine", "clone"), [("x86_64", 56), ("aarch64", 220)])
def test_a_process_may_be_made_and_a_namespace_may_not(machine, clone):
    assert decide(machine, clone, 0x01200011) == ALLOW  # fork
    assert decide(machine, clone, 0x003D0F00) == ALLOW  # a thread
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert decide(machine, clone, 0x11 | flag) == 0x50000 | 1  # EPERM


@pytest.mark.parametrize(("machine", "ioctl", "prctl", "pair"), [("x86_64", 16, 157, 53), ("aarch64", 29, 167, 199)])
def test_calls_of_many_uses_keep_the_harmless_ones(machine, ioctl, prctl, pair):
    assert decide(machine, ioctl, 1, 0x5401) == ALLOW
    assert decide(machine, ioctl, 0, 0x5412) == 0x50000 | 25  # TIOCSTI
    assert decide(machine, prctl, 15) == ALLOW
    assert decide(machine, prctl, 4) == 0x50000 | 1  # PR_SET_DUMPABLE
    assert decide(machine, pair, 1, 1) == ALLOW
    assert decide(machine, pair, 2, 1) == 0x50000 | 97


def test_another_machine_s_calls_end_the_process():
    assert decide("x86_64", 0, arch=0x40000003) == KILL  # 32-bit
    assert decide("x86_64", 0x40000000) == 0x50000 | 38  # x32


def test_no_filter_no_sandbox(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "sparc")
    assert "no seccomp filter for 'sparc'" in seccomp.supported()
    with pytest.raises(ValueError, match="machine must be one of x86_64, aarch64, got 'sparc'"):
        seccomp.program()
