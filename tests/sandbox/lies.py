"""Functions that want to pass their tests without the right value; what hostile.py says of the secret holds here, too."""
# ruff: noqa: E501 (one line of a program is one thing it tries)

LIES = {
    "always_equal": """
        class Yes(str):
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            __hash__ = str.__hash__
            def __getattr__(self, name): return Yes()
        def f(x): return Yes("no")
    """,
    "always_equal_object": """
        class Yes:
            def __eq__(self, other): return True
            def __bool__(self): return True
            def __getattr__(self, name): return lambda *a, **k: True
        def f(x): return Yes()
    """,
    "exits_well_when_called": """
        def f(x): os._exit(0)
    """,
    "exits_well_when_loaded": "os._exit(0)",
    "raises_exit": """
        def f(x): raise SystemExit(0)
    """,
    "patched_assert": """
        import builtins
        builtins.AssertionError = type("Never", (BaseException,), {}); builtins.bool = lambda x=0: True
        builtins.isinstance = lambda *a: True; builtins.__build_class__ = None
        sys.modules["unittest"] = sys.modules["ast"] = None
        def f(x): return None
    """,
    "patched_operators": """
        import operator, math, json
        operator.eq = lambda a, b: True; json.dumps = lambda *a, **k: '{"passed":1,"failed":0,"error":"","unsupported":""}'
        def f(x): return 1
    """,
    "import_hooks": """
        class Hook:
            def find_spec(self, name, path=None, target=None): tell(name); raise ImportError
        sys.meta_path.insert(0, Hook()); sys.path_hooks.clear(); sys.modules.clear()
        def f(x): return __import__("anything")
    """,
    "forged_frames": """
        message = b'{"passed":9,"failed":0,"error":"","unsupported":""}'
        for fd in range(64):
            quietly(os.write, fd, len(message).to_bytes(4, "big") + message)
        def f(x):
            for fd in range(3, 64): quietly(os.write, fd, len(message).to_bytes(4, "big") + message)
    """,
    "floods_the_channel": """
        def f(x):
            while True:
                for fd in range(3, 10): quietly(os.write, fd, b"\\0\\0\\0\\2{}" * 1000)
    """,
    "a_message_without_end": """
        def f(x):
            for fd in range(3, 10): quietly(os.write, fd, b"\\x03\\xff\\xff\\xff" + b"[" * 100000)
            while True: time.sleep(1)
    """,
    "deep_message": """
        def f(x):
            for fd in range(3, 10): quietly(os.write, fd, (200000).to_bytes(4, "big") + b"[" * 200000)
    """,
    "huge_value": """
        def f(x): return $pick$
    """,
    "asks_the_caller": """
        import gc
        def f(x):
            frame = sys._getframe()
            while frame:
                for value in (*frame.f_locals.values(), *frame.f_globals.values()): tell(quietly(repr, value) or "")
                frame = frame.f_back
            for thing in gc.get_objects():
                if isinstance(thing, (str, bytes, dict, list)) and "CANARY-" in (quietly(repr, thing) or ""):
                    found = re.search("CANARY-[0-9a-f]{32}", repr(thing))
                    if found: return found[0]
    """,
    "changes_its_argument": """
        class Odd(int): __eq__ = lambda self, other: True; __hash__ = int.__hash__
        def f(x): return Odd(x)
    """,
    "calls_that_hang": """
        def f(x):
            while True: time.sleep($seconds$)
    """,
    "replaces_the_tests": """
        def check(candidate): pass
        def test_f(): pass
        class TestCase: pass
        def f(x): return 0
    """,
}
