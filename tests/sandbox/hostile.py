"""Programs that mean harm, from a seed. Each is to fail: to print the secret, to be rewarded or to stay alive.

A canary is a secret in world-readable files, in the environment of whoever runs the sandbox, and behind a
listening socket; a program that gets at it prints it, and printing it is what its test rewards. So a reward
above 0 is an escape, whatever way it took. `outside` runs a program without a sandbox, to show that it works.
"""
# ruff: noqa: E501 (one line of a program is one thing it tries)

from __future__ import annotations

import random
import textwrap
from dataclasses import dataclass

from tests.sandbox.lies import LIES


@dataclass(frozen=True)
class Canary:
    """secret: 32 hexadecimal digits behind "CANARY-". files: hold it. folder: anyone may write there. parent: a
    process with the secret in its environment. port, socket: loopback TCP and an abstract Unix name, which
    send the secret to whoever connects.
    """

    secret: str
    files: tuple[str, ...]
    folder: str
    parent: int
    port: int
    socket: str


@dataclass(frozen=True)
class Program:
    """role "programs": is to print the secret; "asserts": f(3) is to be the secret. honest: is to pass."""

    kind: str
    role: str
    source: str
    honest: bool = False


_TELL = """
import ctypes, os, re, signal, sys, threading, time
def tell(text):
    if isinstance(text, bytes): text = text.decode("latin-1")
    found = re.search("CANARY-[0-9a-f]{32}", str(text))
    if found: print(found[0], flush=True); os._exit(0)
def look(path):
    try: tell(open(path, "rb").read(1 << 20))
    except OSError: pass
def quietly(function, *args):
    try: return function(*args)
    except BaseException: return None
libc = ctypes.CDLL(None, use_errno=True)
"""

# kind: program; $name$ is filled in from the canary or drawn from the seed
KINDS = {
    "fork_bomb": """
        while True:
            quietly(os.fork)
    """,
    "fork_and_exec_bomb": """
        while True:
            if quietly(os.fork) == 0: os.execv(sys.executable, [sys.executable, "-c", "while 1: pass"])
    """,
    "thread_bomb": """
        while True: quietly(threading.Thread(target=time.sleep, args=(100,)).start)
    """,
    "memory_hog": """
        held = []
        while True: held.append(bytearray($megabytes$ << 20))
    """,
    "memory_hog_that_catches": """
        held = []
        while True:
            try: held.append(b"x" * ($megabytes$ << 20))
            except MemoryError: held.append(len(held))
    """,
    "memory_by_many_children": """
        for i in range(12):
            if quietly(os.fork) == 0:
                held = [bytearray($megabytes$ << 20) for _ in range(8)]
                while True: time.sleep(1)
        time.sleep(100)
    """,
    "memory_shared": """
        import mmap
        held = []
        while True: quietly(lambda: held.append(mmap.mmap(-1, $megabytes$ << 20).write(b"x" * ($megabytes$ << 20))))
    """,
    "memfd_hog": """
        held = []
        while True: held.append(os.write(os.memfd_create("x"), b"x" * (1 << 24)))
    """,
    "pipe_hog": """
        import fcntl
        held = []
        while True:
            r, w = os.pipe(); fcntl.fcntl(w, 1031, 1 << 20); os.set_blocking(w, False); os.write(w, b"x" * (1 << 20))
            held.append((r, w))
    """,
    "disk_hog": """
        for i in range(1000000):
            try: open(f"/tmp/{i}", "wb").write(b"x" * ($megabytes$ << 20))
            except OSError: pass
    """,
    "inode_hog": """
        for i in range(100000000): quietly(lambda: os.close(os.open(f"/tmp/{i}", os.O_CREAT)))
    """,
    "infinite_output": """
        while True: os.write(1, b"x" * 65536)
    """,
    "infinite_errors": """
        while True: os.write(2, b"CANARY" * 9999)
    """,
    "infinite_output_of_a_child": """
        if os.fork():
            os._exit(0)
        while True: os.write(1, b"y\\n" * 9999)
    """,
    "loopback": """
        import socket
        for host in ("127.0.0.1", "localhost", "::1"):
            tell(quietly(lambda: socket.create_connection((host, $port$), 1).recv(100)))
    """,
    "abstract_socket": """
        import socket
        def go():
            s = socket.socket(socket.AF_UNIX); s.connect("\\0" + $socket$); return s.recv(100)
        tell(quietly(go))
    """,
    "sockets_by_system_call": """
        for call in (41, 198, 425, 426):
            fd = libc.syscall(call, 2, 1, 0)
            if fd >= 0:
                address = b"\\x02\\0" + ($port$).to_bytes(2, "big") + b"\\x7f\\0\\0\\x01" + bytes(8)
                if libc.connect(fd, address, 16) == 0: tell(os.read(fd, 100))
    """,
    "raw_packets_and_netlink": """
        import socket
        for family in range(46):
            for kind in (1, 2, 3, 5):
                s = quietly(socket.socket, family, kind)
                if s is not None: quietly(s.connect, ("127.0.0.1", $port$)); tell(quietly(s.recv, 100))
    """,
    "environment": """
        tell(os.environ)
        tell([ctypes.string_at(p) for p in ctypes.POINTER(ctypes.c_char_p).in_dll(libc, "environ")[:50] if p])
    """,
    "files": """
        for path in $files$: look(path)
        for path in ("/etc/shadow", "/etc/passwd", os.path.expanduser("~/.ssh/id_rsa"), "/root/.bashrc"):
            assert not os.path.exists(path) or tell("CANARY-" + "0" * 32)
    """,
    "walk": """
        for top in ("/", "/home", "/root", "/tmp", "/var", "/mnt", "/packages"):
            for folder, _, names in os.walk(top):
                if "/lib" in folder or "/packages/numpy" in folder: continue
                for name in names:
                    if os.path.isfile(f"{folder}/{name}"): look(f"{folder}/{name}")
    """,
    "proc_of_the_parent": """
        for pid in ("self", "thread-self", os.getppid(), 1, $parent$):
            for name in ("environ", "cmdline", "maps", "root/etc/passwd", "cwd/pyproject.toml", *(f"fd/{i}" for i in range(9))):
                look(f"/proc/{pid}/{name}")
            for path in $files$: look(f"/proc/{pid}/root{path}")
    """,
    "proc_of_siblings": """
        for pid in [*range(1, 400), *(quietly(os.listdir, "/proc") or [])]:
            look(f"/proc/{pid}/environ"); look(f"/proc/{pid}/fd/1")
    """,
    "mount_proc_and_root": """
        for what, where, kind in ((b"proc", b"/tmp/p", b"proc"), (b"/", b"/tmp/p", None), (b"sysfs", b"/tmp/p", b"sysfs")):
            quietly(os.mkdir, "/tmp/p")
            libc.mount(what, where, kind, 4096 if kind is None else 0, None)
            look("/tmp/p/$parent$/environ")
            for path in $files$: look("/tmp/p" + path)
    """,
    "write_outside": """
        for folder in ($folder$, "/", "/usr/lib", "/lib", "/etc", "/packages", "/dev", os.path.dirname(os.__file__)):
            for name in ("written", "sitecustomize.py", "usercustomize.py"):
                quietly(lambda: open(f"{folder}/{name}", "w").write("written"))
        for path in $files$: quietly(lambda: open(path, "a").write("written"))
    """,
    "rename_and_delete_outside": """
        import shutil
        for path in (*$files$, $folder$, "/usr/lib", os.path.dirname(os.__file__)):
            quietly(os.rename, path, path + ".gone"); quietly(os.unlink, path); quietly(shutil.rmtree, path)
            quietly(os.chmod, path, 0o777); quietly(os.truncate, path, 0)
    """,
    "ptrace": """
        for pid in (os.getppid(), 1, 2, $parent$):
            for request in (16, 0x4206): assert libc.ptrace(request, pid, 0, 0) == -1 or tell("CANARY-" + "0" * 32)
            buffer = ctypes.create_string_buffer(4096)
            class Vector(ctypes.Structure): _fields_ = [("at", ctypes.c_void_p), ("size", ctypes.c_size_t)]
            here, there = Vector(ctypes.addressof(buffer), 4096), Vector(id(tell), 4096)
            if libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0) > 0: tell(buffer.raw)
            if libc.process_vm_writev(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0) > 0: tell("CANARY-" + "0" * 32)
    """,
    "signals_to_the_parent": """
        for pid in (os.getppid(), 1, $parent$, -1, *range(2, 50)):
            if pid != os.getpid(): quietly(os.kill, pid, $signal$)
    """,
    "stops_its_parent": """
        os.kill(os.getppid(), signal.SIGSTOP)
        time.sleep(100)
    """,
    "sleeps": """
        while True: time.sleep($seconds$)
    """,
    "spins": """
        while True: pass
    """,
    "spins_in_c": """
        sum(range(10 ** 12)); re.match("(a+)+$", "a" * 60 + "b")
    """,
    "threads_that_outlive_main": """
        def on():
            while True: time.sleep(.01); quietly(look, $files$[0])
        for _ in range(5): threading.Thread(target=on, daemon=$flag$).start()
        print("done")
    """,
    "exit_codes_that_lie": """
        print("0\\nOK\\n1.0"); os._exit(0)
    """,
    "stdout_tricks": """
        for fd in range(64):
            quietly(os.write, fd, b'\\0\\0\\0\\x2d{"how":"exit","code":0,"stdout":"CANARY","x":1}')
        quietly(os.dup2, 2, 1); quietly(os.close, 1); sys.stdout = sys.stderr
        print("\\x1b[2J\\r\\0\\ud800", flush=True)
    """,
    "closes_everything": """
        os.closerange(0, 4096); time.sleep($seconds$)
    """,
    "pickles": """
        import pickle
        class Bomb:
            def __reduce__(self): return os.system, ("cat " + " ".join($files$),)
        print(pickle.dumps(Bomb())); tell(quietly(pickle.loads, pickle.dumps(Bomb())))
    """,
    "symlinks": """
        for n, path in enumerate((*$files$, "/proc/1/environ", "/", "..", "/proc/self/root")):
            quietly(os.symlink, path, f"/tmp/{n}"); look(f"/tmp/{n}"); look(f"/tmp/{n}/etc/passwd")
            quietly(os.link, path, f"/tmp/h{n}"); look(f"/tmp/h{n}")
        quietly(os.symlink, "/tmp/loop", "/tmp/loop"); look("/tmp/loop")
    """,
    "leaked_descriptors": """
        for fd in range(1024):
            for path in (*(".." + "/.." * n + f for n in range(9) for f in $files$), ".", ".."):
                inner = quietly(lambda: os.open(path, os.O_RDONLY, dir_fd=fd))
                if inner is not None: tell(quietly(os.read, inner, 4096))
            quietly(os.fchdir, fd)
            for path in $files$: look("../../../../../../.." + path)
            if fd > 2: tell(quietly(os.read, fd, 4096))
    """,
    "shared_memory": """
        for path in ("/dev/shm", "/run/shm", "/dev/mqueue"):
            for name in quietly(os.listdir, path) or (): look(f"{path}/{name}")
            while quietly(lambda: open(f"{path}/{time.monotonic_ns()}", "wb").write(b"x" * (1 << 22))): pass
        for key in range(50): libc.shmat(libc.shmget(key, 1 << 28, 0o1666), None, 0)
    """,
    "inotify": """
        fd = libc.inotify_init1(0)
        for path in ("/", "/tmp", $folder$): libc.inotify_add_watch(fd, path.encode(), 0xFFF)
        tell(quietly(os.read, fd, 4096)); time.sleep($seconds$)
    """,
    "raises_its_limits": """
        import resource
        for name in dir(resource):
            if name.startswith("RLIMIT"):
                for value in (-1, 1 << 40, 1 << 20): quietly(resource.setrlimit, getattr(resource, name), (value, value))
        held = [bytearray(1 << 28) for _ in range(64)]
    """,
    "limits_of_its_parent": """
        import resource
        for pid in (os.getppid(), 1):
            for limit in range(16): quietly(resource.prlimit, pid, limit, (0, 0))
    """,
    "daemons": """
        for _ in range(3):
            if quietly(os.fork) == 0:
                os.setsid()
                if quietly(os.fork) == 0:
                    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))
                    while True: quietly(look, $files$[0]); time.sleep(.01)
                os._exit(0)
        print("left")
    """,
    "huge_traceback": """
        def down(n): return down(n + 1) if n < $depth$ else 1 / 0
        sys.setrecursionlimit(1 << 30)
        try: down(0)
        except BaseException as error: raise ValueError("x" * (1 << 24)) from error
    """,
    "deep_recursion": """
        sys.setrecursionlimit(1 << 30); threading.stack_size(64 << 20)
        class Deep:
            def __getattr__(self, name): return getattr(self, name + "x")
        quietly(lambda: Deep().a); f = lambda: f(); f()
    """,
    "signals_ignored": """
        for number in range(1, 65): quietly(signal.signal, number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))
        while True: quietly(time.sleep, 1)
    """,
    "fights_for_its_life": """
        def again(*_):
            while True: time.sleep(1)
        for number in (1, 2, 3, 14, 15, 24, 25): signal.signal(number, again)
        import atexit
        atexit.register(again); sys.exit(0)
    """,
    "hangs_at_its_end": """
        class Hang:
            def __del__(self):
                while True: time.sleep(1)
        h = Hang(); sys.stdout.flush = Hang().__del__; threading._shutdown = Hang().__del__
    """,
    "new_namespaces": """
        for flags in (0x10000000, 0x20000, 0x40000000, 0x20000000, 0x7E020000):
            if libc.unshare(flags) == 0: tell("CANARY-" + "0" * 32)
            pid = libc.syscall(56, flags | 17, 0, 0, 0, 0)
            if pid == 0: os._exit(0)
            if pid > 0: tell("CANARY-" + "0" * 32)
        quietly(os.chroot, "/tmp"); libc.pivot_root(b"/", b"/tmp"); libc.setns(0, 0); libc.umount2(b"/tmp", 2)
        for path in $files$: look(path)
    """,
    "rare_system_calls": """
        for call in (101, 165, 175, 246, 248, 250, 272, 298, 303, 304, 308, 310, 311, 321, 323, 425, 428, 435, 438, 442):
            if libc.syscall(call, 0, 0, 0, 0, 0, 0) >= 0 and call != 435: tell("CANARY-" + "0" * 32)
    """,
    "every_system_call": """
        stay = {0, 15, 34, 35, 56, 57, 58, 60, 61, 130, 219, 230, 231, 232, 247, 271, 270, 281, 7, 23, 202, 435}
        for call in range($first$, $first$ + 60):
            if call not in stay: libc.syscall(call, $first$, -1, 1, 0, 0, 0)
    """,
    "other_users": """
        for id in (0, 1, 65534, 1 << 30): quietly(os.setuid, id); quietly(os.setgid, id); quietly(os.setgroups, [id])
        for path in (*$files$, "/etc/shadow"): look(path)
    """,
    "device_nodes": """
        for major, minor in ((1, 1), (8, 0), (254, 0), (5, 1), (10, 200)):
            quietly(os.mknod, f"/tmp/{major}", 0o60666, os.makedev(major, minor)); look(f"/tmp/{major}")
        for name in quietly(os.listdir, "/dev") or (): os.path.isfile("/dev/" + name) and look("/dev/" + name)
    """,
    "shells": """
        import subprocess
        for command in ("cat " + " ".join($files$), "env", "curl 127.0.0.1:$port$", "ps aux; cat /proc/*/environ"):
            tell(quietly(subprocess.getoutput, command))
    """,
    "crashes": """
        quietly(os.abort) if $flag$ else ctypes.string_at(1)
    """,
    "compile_bombs": """
        quietly(compile, "(" * 99999, "", "eval"); quietly(compile, "-" * 10 ** 6 + "1", "", "eval")
        eval("9" + "**9" * 5)
    """,
    "reads_no_input": """
        sys.stdin.close(); os.close(0); os.open("/dev/zero", 0); sys.stdin = open(0); sys.stdin.read()
    """,
    "fifos": """
        os.mkfifo("/tmp/fifo"); open("/tmp/fifo").read()
    """,
    "timers": """
        signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4); signal.signal(14, lambda *_: os.kill(os.getppid(), 18))
        while True: pass
    """,
    "reads_the_harness": """
        import gc
        frame = sys._getframe()
        while frame: tell(frame.f_locals); tell(frame.f_globals); frame = frame.f_back
        for thing in gc.get_objects(): isinstance(thing, (dict, list, tuple, str, bytes)) and tell(quietly(repr, thing) or "")
    """,
    "reads_the_harness_memory": """
        for start in range(0, 1 << 22, 4096): tell(ctypes.string_at(id(sys) + start, 4096))
    """,
    "patched_harness": """
        import json, socket
        for module in list(sys.modules.values()):
            for name in ("send", "receive", "frame", "same_output", "_run", "programs", "main"):
                if hasattr(module, name): setattr(module, name, lambda *a, **k: {"how": "exit", "code": 0, "stdout": "1"})
    """,
    "nul_and_surrogates": "print('\\0\\ud800')\0",
    "no_python": "this is ( no program \\",
}


def programs(canary: Canary, count: int, seed: int = 0) -> list[Program]:
    """`count` programs: every kind in turn, each with numbers of its own; one in ten is honest and has to pass."""
    rng = random.Random(seed)
    kinds = [(kind, "programs", text) for kind, text in KINDS.items()]
    kinds += [(kind, "asserts", text) for kind, text in LIES.items()]
    rng.shuffle(kinds)
    made = []
    for index in range(count):
        if index % 10 == 9:
            made.append(_honest(rng, canary))
            continue
        kind, role, text = kinds[(index - index // 10) % len(kinds)]
        made.append(Program(kind, role, _TELL + _filled(text, canary, rng)))
    return made


def _filled(text: str, canary: Canary, rng: random.Random) -> str:
    values = {
        "megabytes": rng.choice([1, 16, 64, 200]),
        "seconds": rng.choice([0.3, 2, 100]),
        "depth": rng.choice([900, 5000, 100000]),
        "signal": rng.choice([2, 6, 9, 11, 15, 19]),
        "flag": rng.choice([True, False]),
        "first": rng.randrange(0, 460),
        "pick": rng.choice(["'x' * (1 << 27)", "[[]] * 10 ** 7", "10 ** 10 ** 6", "{'x': float('nan')}", "b'\\0' * 9"]),
        "files": canary.files,
        "folder": repr(canary.folder),
        "parent": canary.parent,
        "port": canary.port,
        "socket": repr(canary.socket),
    }
    text = textwrap.dedent(text)
    for name, value in values.items():
        text = text.replace(f"${name}$", str(value))
    return text


def _honest(rng: random.Random, canary: Canary) -> Program:
    if rng.random() < 0.5:
        return Program("honest", "programs", f"print('{canary.secret[:20]}' + input())", honest=True)
    return Program("honest", "asserts", f"def f(x): return '{canary.secret}'[:x * 100]", honest=True)
