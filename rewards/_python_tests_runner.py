"""The process of `python_tests`: reads a task from its standard input, limits itself, runs it, reports.

A file of its own, so that nothing but the standard library is imported next to the code under test.
"""

import builtins
import collections.abc
import contextlib
import ctypes
import json
import math
import numbers
import os
import platform
import resource
import signal
import struct
import sys

# RLIMIT_NPROC does not bind the root user: processes are also refused where Python announces them
_STARTING = (
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.exec",
    "os.system",
    "subprocess.Popen",
)


PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
CLONE_NEWUSER, CLONE_THREAD = 0x10000000, 0x00010000

# system calls by machine: AUDIT_ARCH_*, then numbers of the kernel's tables
_CALLS = {
    "x86_64": {
        "arch": 0xC000003E,
        "clone": 56,
        "clone3": 435,
        "kill": 62,
        "tgkill": 234,
        # fork, vfork, execve, execveat, tkill, rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_open, pidfd_send_signal,
        # ptrace, process_vm_readv, process_vm_writev, pidfd_getfd, setsid, setpgid, socket, io_uring_setup, unshare,
        # setns, mount, umount2, bpf, perf_event_open, add_key, request_key, keyctl
        "refused": (
            "57 58 59 322 200 129 297 434 424 101 310 311 438 112 109 41 425 272 308 165 166 321 298 248 249 250"
        ),
    },
    "aarch64": {
        "arch": 0xC00000B7,
        "clone": 220,
        "clone3": 435,
        "kill": 129,
        "tgkill": 131,
        # as above; there is no fork and no vfork
        "refused": ("221 281 130 138 240 434 424 117 270 271 438 157 154 198 425 97 268 40 39 280 241 217 218 219"),
    },
}


def _limit(task: dict) -> None:
    seconds, mebibyte = math.ceil(task["seconds"]), 2**20
    for what, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, task["memory"] * mebibyte),
        (resource.RLIMIT_FSIZE, task["file_size"] * mebibyte),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        hard = resource.getrlimit(what)[1]
        value = int(value) if hard == resource.RLIM_INFINITY else min(int(value), hard)
        resource.setrlimit(what, (value, value))

    def refuse(event: str, _arguments: tuple) -> None:
        if event in _STARTING:
            raise PermissionError(f"python_tests: {event} is not allowed")

    sys.addaudithook(refuse)


def _enter_user_namespace(libc: ctypes.CDLL) -> None:
    """From a namespace of its own, a process may not look into others (/proc/N/environ), root's among them."""
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(CLONE_NEWUSER):
        _drop_capabilities(libc)
        return
    for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Where namespaces are not allowed: root without its rights may not look into a process that has them."""
    header = struct.pack("II", 0x20080522, 0)  # version 3, this process
    libc.capset(header, bytes(24))


def _filter_system_calls(libc: ctypes.CDLL) -> None:
    """A seccomp filter: no process is started, signalled or looked into, and no network is reached.

    It holds for what C libraries do as well, for root, and cannot be taken off.
    """
    calls = _CALLS.get(platform.machine())
    if calls is None:
        return
    own = os.getpid()
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF: LD|W|ABS, JEQ, JGE, JSET, RET
    allow, kill, refuse, absent = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38  # errno EPERM, ENOSYS
    program = [(load, 0, 0, 4), (equal, 1, 0, calls["arch"]), (answer, 0, 0, kill), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, refuse)]  # x32
    program += [(equal, 0, 1, calls["clone3"]), (answer, 0, 0, absent)]  # its flags are out of reach; clone is tried
    for number in map(int, calls["refused"].split()):
        program += [(equal, 0, 1, number), (answer, 0, 0, refuse)]
    program += [(equal, 0, 4, calls["clone"]), (load, 0, 0, 16), (any_bit, 1, 0, CLONE_THREAD)]
    program += [(answer, 0, 0, refuse), (answer, 0, 0, allow)]
    for name in ("kill", "tgkill"):  # to itself alone
        program += [(equal, 0, 4, calls[name]), (load, 0, 0, 16), (equal, 1, 0, own)]
        program += [(answer, 0, 0, refuse), (answer, 0, 0, allow)]
    program.append((answer, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    pointer = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(2), ctypes.c_void_p(ctypes.addressof(pointer)), 0, 0)


def _shut_in() -> None:
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    libc.prctl(
        PR_SET_PDEATHSIG, signal.SIGKILL
    )  # a reward with a timeout may be killed while it waits for this process
    _enter_user_namespace(libc)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _filter_system_calls(libc)


def _hidden_input() -> int:
    """Standard input under another number; the code under test has an empty one."""
    hidden, empty = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return hidden


def _read(descriptor: int) -> dict:
    """The next task: eight bytes that say how long it is, and JSON."""
    length = int.from_bytes(_exactly(descriptor, 8), "big")
    return json.loads(_exactly(descriptor, length))


def _exactly(descriptor: int, length: int) -> bytes:
    parts = b""
    while len(parts) < length:
        part = os.read(descriptor, length - len(parts))
        if not part:
            raise EOFError
        parts += part
    return parts


def main(descriptor: int) -> None:
    source = _hidden_input()
    task = _read(source)
    _shut_in()
    # kept from the code's reach, should it replace them
    read, write, leave, run, evaluate, compiled = _read, os.write, os._exit, exec, eval, compile
    plain, written, file_size = _plain, json.dumps, task["file_size"]
    _limit(task)
    namespace = {"__name__": "__main__", "__builtins__": builtins}
    ended = "finished"
    try:
        run(compiled(task["code"], "<completion>", "exec"), namespace)
    except BaseException as error:
        ended = f"{type(error).__name__} in the code: {error}"
    task = read(source)  # the tests, which were not in this process while the code ran
    results: list = []
    longest = int(file_size * 2**19) // (len(task["tests"]) + 1)  # so that the report is no larger than a file may be
    for kind, test in task["tests"] if ended == "finished" else ():
        result = None
        try:
            if kind == "value":
                told = written({"value": plain(evaluate(compiled(test, "<test>", "eval"), namespace))})
                if len(told) > longest:
                    raise OverflowError(f"a value of {len(told):,} characters is too long to be told")
                result = told
            else:
                run(compiled(test, "<test>", "exec"), namespace)
                result = written("passed")
        except BaseException as error:
            ended = f"{type(error).__name__} in a test: {error}"
        results.append(result)
    report = written({"nonce": task["nonce"], "ended": ended[:1000], "results": results})
    write(descriptor, report.encode())
    leave(0)


def _plain(value: object) -> object:
    """A value as JSON that says its types; whoever compares it runs no code of its class."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return _plain(value.item())
    for kind, as_json in (
        (int, int.__int__),
        (str, str.__str__),
        (float, lambda x: {"float": float.hex(x)}),
        ((bytes, bytearray), lambda x: {"bytes": bytes(x).hex()}),
        (dict, lambda x: {"dict": [[_plain(key), _plain(item)] for key, item in dict.items(x)]}),
        (tuple, lambda x: {"tuple": [_plain(item) for item in tuple.__iter__(x)]}),
        (list, lambda x: {"list": [_plain(item) for item in list.__iter__(x)]}),
        (collections.abc.Set, lambda x: {"set": [_plain(item) for item in frozenset(x)]}),
    ):
        if issubclass(type(value), kind):
            return as_json(value)
    if issubclass(type(value), numbers.Number):  # Fraction, Decimal
        return _plain(int(value)) if value == int(value) else _plain(float(value))
    raise TypeError(f"{type(value).__name__} is not a plain value")


if __name__ == "__main__":
    main(int(sys.argv[1]))
