"""A server with the paths of vLLM that the trainer uses, answered by a small transformers model in a thread."""

import base64
import contextlib
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fake_nccl
import tiny
import torch
from safetensors.torch import load_file

from flowrl_kernels.trainer import config_file
from flowrl_kernels.trainer import policy as policies
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.policy import Policy
from flowrl_kernels.trainer.rollout import Sampling
from flowrl_kernels.trainer.rollout.hf import HFEngine
from flowrl_kernels.trainer.tasks import build_task, char_tokenizer


class FakeVLLM:
    """`faults`: what goes wrong with the next requests to generate, in order; None: nothing."""

    def __init__(self, config, tokenizer):
        self.make = lambda: Policy(policies.build_model(config, tokenizer, "sdpa").eval())
        self.faults, self.asked, self.loads, self.lock = [], [], 0, threading.Lock()
        self.called = []  # of the workers' methods
        self.workers, self.told, self.received = 1, [], []  # told: requests of the weight transfer
        self.port = 0
        self.start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        """Up, at the same port as before, with weights that nobody wants."""
        self.engine = HFEngine(self.make(), batch=64, device=torch.device("cpu"))
        with torch.no_grad():
            for p in self.engine.policy.parameters():
                p.mul_(3.0)
        self.version, fake = "default", self
        self.groups, self.updating = [], False  # a rank of a communicator for each worker

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                self.do_POST()

            def do_POST(self):
                size = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(size)) if size else None
                status, answer = fake.answer(self.path, body, self)
                if status is None:
                    return
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def get_request(self):
                connection, peer = super().get_request()
                fake.connections.append(connection)
                return connection, peer

        self.connections = []
        self.server = Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def kill(self):
        """Gone at once, connections and all."""
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server = None

    def answer(self, path, body, handler):
        if path == "/weight_info":
            return 200, {"weight_version": self.version}
        if path == "/collective_rpc":
            self.called.append((body["method"], *body["args"]))
            if body["method"] == "flowrl_head":
                return 200, {"results": [True]}
            assert body["method"] == "flowrl_load", body
            for file in Path(body["args"][0]).glob("*.safetensors"):
                self.engine.policy.model.load_state_dict(load_file(file), strict=False)
            self.loads += 1
            return 200, {"results": [{"tensors": 1}]}
        if path == "/reset_prefix_cache":
            return 200, {"success": True}
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return 200, {"success": True}
        if path in TRANSFER:
            self.told.append((path, body))
            try:
                return 200, TRANSFER[path](self, **(body or {}))
            except Exception as error:  # as vLLM's routes
                return 500, {"error": {"message": f"{type(error).__name__}: {error}"}}
        if path != "/inference/v1/generate":
            return 404, {"detail": "Not Found"}
        with self.lock:
            self.asked.append(body)
            fault = self.faults.pop(0) if self.faults else None
            answer = self.generate(body)
        return fault(answer, handler) if fault else (200, answer)

    # ---- weights by NCCL: the same orders are refused as by vLLM's worker, field names as its dataclasses have them

    def join(self, init_info):
        unique = base64.b64decode(init_info["nccl_unique_id_b64"], validate=True)
        assert len(unique) == 128
        assert init_info["packed"] is False
        assert init_info.keys() == {"nccl_unique_id_b64", "rank_offset", "world_size", "packed"}
        size, first = init_info["world_size"], init_info["rank_offset"]
        self.groups = self.each(lambda worker: fake_nccl.meet(unique, size, first + worker))
        return {"message": "Weight transfer initialized"}

    def each(self, action):
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(action, range(self.workers)))

    def begin(self):
        if self.updating:
            raise RuntimeError("start_weight_update called while a weight update is already active")
        self.updating, self.parts = True, [{} for _ in range(self.workers)]
        return {"message": "Weight update started"}

    def update(self, update_info):
        if not self.updating or not self.groups:
            raise RuntimeError("start_weight_update must be called before update_weights.")
        names, shapes = update_info["names"], update_info["shapes"]
        dtypes = [getattr(torch, name) for name in update_info["dtype_names"]]

        def receive(worker):
            for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
                self.parts[worker][name] = self.groups[worker].receive(shape, dtype)

        self.each(receive)
        return {"message": "Weights updated"}

    def finish(self, weight_version=None):
        if not self.updating:
            raise RuntimeError("finish_weight_update called without a matching start_weight_update.")
        self.received.append(self.parts)
        self.engine.policy.model.load_state_dict(self.parts[0], strict=False)
        self.updating, self.version = False, weight_version or self.version
        return {"message": "Weight update finished"}

    def leave(self):
        if self.updating:
            raise RuntimeError("Cannot release a trainer connection during a weight update")
        self.groups = []
        return {"message": "Weight transfer shut down"}

    def generate(self, body):
        p = body["sampling_params"]
        sampling = Sampling(p["max_tokens"], p["temperature"], tuple(p["stop_token_ids"]))
        out = self.engine.generate([body["token_ids"]], p["n"], sampling, p["seed"])
        choices = []
        for j, length in enumerate(out.length.tolist()):
            content = [{"token_id": int(t), "logprob": float(x)} for t, x in zip(out.tokens[j], out.logp[j])][:length]
            span = {"version": self.version, "start": 0, "end": length}
            choices.append({"index": j, "token_ids": out.tokens[j, :length].tolist(), "logprobs": {"content": content},
                            "weight_versions": [span], "finish_reason": "stop"})  # fmt: skip
        return {"request_id": "1", "choices": choices}


TRANSFER = {
    "/get_world_size": lambda fake: {"world_size": fake.workers},
    "/shutdown_weight_transfer_engine": FakeVLLM.leave,
    "/init_weight_transfer_engine": FakeVLLM.join,
    "/start_weight_update": FakeVLLM.begin,
    "/update_weights": FakeVLLM.update,
    "/finish_weight_update": FakeVLLM.finish,
}


def of_sums():
    """One whose model is that of `small`."""
    config = config_file.override(Config(), small("http://a:1"))
    return FakeVLLM(config, char_tokenizer(build_task(config.task).alphabet))


def small(address, *more):
    """Command-line arguments of a run of seconds that asks these servers."""
    addresses = [address] if isinstance(address, str) else address
    return [*tiny.SMALL, "--run.steps", "3", "--rollout.engine", "server", "--rollout.timeout", "5",
            *more, "--rollout.servers", *addresses]  # fmt: skip
