"""Which system calls a sandboxed program may make: a seccomp filter as BPF bytes, for bubblewrap's --seccomp.

What is not listed fails with ENOSYS, as on a kernel that does not have it: so are ptrace, mount, keyctl, bpf,
userfaultfd, perf_event_open, io_uring, unshare, setns, kexec, memfd_create, shared memory, message queues,
inotify, sockets of a network, and whatever a later kernel adds. Numbers are of the kernel's own tables
(arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h); the layout of `sock_filter` and
`seccomp_data` is of linux/filter.h and linux/seccomp.h.
"""

from __future__ import annotations

import errno
import platform
import struct

_X86_64 = """
read=0 write=1 readv=19 writev=20 pread64=17 pwrite64=18 preadv=295 pwritev=296 lseek=8 sendfile=40
copy_file_range=326 open=2 openat=257 creat=85 close=3 close_range=436 dup=32 dup2=33 dup3=292 fcntl=72 flock=73
pipe=22 pipe2=293 stat=4 fstat=5 lstat=6 newfstatat=262 statx=332 statfs=137 fstatfs=138 access=21 faccessat=269
faccessat2=439 readlink=89 readlinkat=267 getdents=78 getdents64=217 getcwd=79 chdir=80 fchdir=81 mkdir=83
mkdirat=258 rmdir=84 unlink=87 unlinkat=263 rename=82 renameat=264 renameat2=316 link=86 linkat=265 symlink=88
symlinkat=266 chmod=90 fchmod=91 fchmodat=268 utimensat=280 umask=95 truncate=76 ftruncate=77 fallocate=285
fadvise64=221 fsync=74 fdatasync=75 mmap=9 munmap=11 mprotect=10 mremap=25 madvise=28 brk=12 mincore=27 msync=26
rt_sigaction=13 rt_sigprocmask=14 rt_sigreturn=15 rt_sigpending=127 rt_sigsuspend=130 rt_sigtimedwait=128
sigaltstack=131 kill=62 tkill=200 tgkill=234 pause=34 alarm=37 getitimer=36 setitimer=38 restart_syscall=219
select=23 pselect6=270 poll=7 ppoll=271 epoll_create=213 epoll_create1=291 epoll_ctl=233 epoll_wait=232
epoll_pwait=281 eventfd2=290 fork=57 vfork=58 execve=59 exit=60 exit_group=231 wait4=61 waitid=247 getpid=39
getppid=110 gettid=186 getuid=102 geteuid=107 getgid=104 getegid=108 getgroups=115 getresuid=118 getresgid=120
getpgid=121 getpgrp=111 getsid=124 setpgid=109 setsid=112 getrlimit=97 setrlimit=160 prlimit64=302 getrusage=98
times=100 sysinfo=99 uname=63 getpriority=140 gettimeofday=96 time=201 clock_gettime=228 clock_getres=229
nanosleep=35 clock_nanosleep=230 sendto=44 recvfrom=45 sendmsg=46 recvmsg=47 shutdown=48 getsockname=51
getpeername=52 getsockopt=55 futex=202 set_robust_list=273 get_robust_list=274 set_tid_address=218 rseq=334
arch_prctl=158 membarrier=324 sched_yield=24 sched_getaffinity=204 getcpu=309 getrandom=318 pidfd_open=434
"""
_AARCH64 = """
read=63 write=64 readv=65 writev=66 pread64=67 pwrite64=68 preadv=69 pwritev=70 lseek=62 sendfile=71
copy_file_range=285 openat=56 close=57 close_range=436 dup=23 dup3=24 fcntl=25 flock=32 pipe2=59 fstat=80
newfstatat=79 statx=291 statfs=43 fstatfs=44 faccessat=48 faccessat2=439 readlinkat=78 getdents64=61 getcwd=17
chdir=49 fchdir=50 mkdirat=34 unlinkat=35 renameat=38 renameat2=276 linkat=37 symlinkat=36 fchmod=52 fchmodat=53
utimensat=88 umask=166 truncate=45 ftruncate=46 fallocate=47 fadvise64=223 fsync=82 fdatasync=83 mmap=222 munmap=215
mprotect=226 mremap=216 madvise=233 brk=214 mincore=232 msync=227 rt_sigaction=134 rt_sigprocmask=135
rt_sigreturn=139 rt_sigpending=136 rt_sigsuspend=133 rt_sigtimedwait=137 sigaltstack=132 kill=129 tkill=130
tgkill=131 getitimer=102 setitimer=103 restart_syscall=128 pselect6=72 ppoll=73 epoll_create1=20 epoll_ctl=21
epoll_pwait=22 eventfd2=19 execve=221 exit=93 exit_group=94 wait4=260 waitid=95 getpid=172 getppid=173 gettid=178
getuid=174 geteuid=175 getgid=176 getegid=177 getgroups=158 getresuid=148 getresgid=150 getpgid=155 getsid=156
setpgid=154 setsid=157 getrlimit=163 setrlimit=164 prlimit64=261 getrusage=165 times=153 sysinfo=179 uname=160
getpriority=141 gettimeofday=169 clock_gettime=113 clock_getres=114 nanosleep=101 clock_nanosleep=115 sendto=206
recvfrom=207 sendmsg=211 recvmsg=212 shutdown=210 getsockname=204 getpeername=205 getsockopt=209 futex=98
set_robust_list=99 get_robust_list=100 set_tid_address=96 rseq=293 membarrier=283 sched_yield=124
sched_getaffinity=123 getcpu=168 getrandom=278 pidfd_open=434
"""
# name: (AUDIT_ARCH_*, calls allowed whatever their arguments, then clone, clone3, ioctl, prctl, socketpair)
_MACHINES = {
    "x86_64": (0xC000003E, _X86_64, (56, 435, 16, 157, 53)),
    "aarch64": (0xC00000B7, _AARCH64, (220, 435, 29, 167, 199)),
}
_X32 = 0x40000000  # the bit of x86-64's second table of calls
_NEW_NAMESPACE = 0x7E020000  # CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID, NET
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIO(N)CLEX
_PRCTLS = (15, 16)  # PR_SET_NAME, PR_GET_NAME
_AF_UNIX = 1

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JSET|K, BPF_RET|K
_NUMBER, _ARCH, _FIRST, _SECOND = 0, 4, 16, 24  # offsets in seccomp_data; low words of the arguments
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def supported() -> str | None:
    """None, or why there is no filter for this machine."""
    machine = platform.machine()
    return None if machine in _MACHINES else f"no seccomp filter for {machine!r}, only for {', '.join(_MACHINES)}"


def program(machine: str | None = None) -> bytes:
    """The filter for `machine` ("x86_64" or "aarch64"; None: this one). Raises ValueError for another."""
    machine = machine or platform.machine()
    if machine not in _MACHINES:
        raise ValueError(f"machine must be one of {', '.join(_MACHINES)}, got {machine!r}")
    arch, table, (clone, clone3, ioctl, prctl, socketpair) = _MACHINES[machine]
    code: list[tuple[int, int, int, int]] = []

    def add(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> None:
        code.append((operation, if_true, if_false, value))

    def fail(number: int) -> None:
        add(_RETURN, _ERRNO | number)

    def only(call: int, argument: int, values: tuple[int, ...], error: int) -> None:
        add(_EQUAL, call, 0, 2 + 2 * len(values))
        add(_LOAD, argument)
        for value in values:
            add(_EQUAL, value, 0, 1)
            add(_RETURN, _ALLOW)
        fail(error)

    add(_LOAD, _ARCH)
    add(_EQUAL, arch, 1, 0)
    add(_RETURN, _KILL)
    add(_LOAD, _NUMBER)
    add(_ANY_BIT, _X32, 0, 1)
    fail(errno.ENOSYS)
    for pair in table.split():
        add(_EQUAL, int(pair.partition("=")[2]), 0, 1)
        add(_RETURN, _ALLOW)
    add(_EQUAL, clone, 0, 4)
    add(_LOAD, _FIRST)
    add(_ANY_BIT, _NEW_NAMESPACE, 0, 1)
    fail(errno.EPERM)
    add(_RETURN, _ALLOW)
    add(_EQUAL, clone3, 0, 1)
    fail(errno.ENOSYS)  # its flags are in memory, out of a filter's sight; libc falls back to clone
    only(ioctl, _SECOND, _IOCTLS, errno.ENOTTY)
    only(prctl, _FIRST, _PRCTLS, errno.EPERM)
    only(socketpair, _FIRST, (_AF_UNIX,), errno.EAFNOSUPPORT)
    fail(errno.ENOSYS)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
