"""The life of a server: it listens at once, loads, serves, and ends in order."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading
from collections.abc import Callable
from typing import Any

import torch
import uvicorn

from zipper_lm.data.document import Document, Segment
from zipper_lm.generation.engine.engine import Engine
from zipper_lm.serve.app import create_app
from zipper_lm.serve.protocol import protocol_of
from zipper_lm.serve.service import THREADS, Service

GRACE = 30.0
"""Seconds that requests may take to finish once the server ends."""


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Server(uvicorn.Server):
    """Ends in order: first nobody new is served, then those who are there are waited for, then nothing listens.

    Args:
        service: what is served. grace: seconds that these have.
    """

    def __init__(self, service: Service, grace: float = GRACE) -> None:
        self.service, self.grace = service, grace
        config = uvicorn.Config(
            create_app(service),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            http=protocol_of(service.limits.stall),
            timeout_keep_alive=30,
            timeout_graceful_shutdown=max(1, round(grace)),
            ws="websockets-sansio",
            ws_max_size=service.limits.messages,
            ws_max_queue=4,
            ws_per_message_deflate=False,
        )
        super().__init__(config)
        service.connections = lambda: len(self.server_state.connections)

    async def shutdown(self, sockets: Any = None) -> None:
        """As Uvicorn calls it, after Ctrl-C and SIGTERM."""
        ending = asyncio.ensure_future(self.service.end(self.grace))
        while not ending.done() and not self.force_exit:
            await asyncio.sleep(0.05)
        ending.cancel()
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises `OSError` if the address cannot be had; port 0 is any."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)


def warm(engine: Engine) -> None:
    """Have each tower write a token from each that it reads: what is made at the first one is made now, in an engine's
    thread that has the cores which codecs leave."""
    for reader, source in engine.model.layer_pairs:
        engine.submit(Document([Segment(source, ids=[])]), [reader], {reader: {"max_new_tokens": 1}}).result()


def serve(
    load: Callable[[], Engine], service: Service, listening: socket.socket, grace: float = GRACE, ready: Any = None
) -> None:
    """Serve until a signal says otherwise.

    Args:
        load: makes the engine, in a thread of its own: while it does, clients are told to wait.
        service: what is served. listening: from `listen`. grace: see `Server`. ready: called when it is loaded.

    Raises:
        Exception: what `load` raises.
    """
    server = Server(service, grace)
    failure: list[BaseException] = []

    def begin() -> None:
        try:
            torch.set_num_threads(max(1, torch.get_num_threads() - THREADS))
            engine = load()
            warm(engine)
            service.begin(engine)
            if ready is not None:
                ready()
        except BaseException as error:
            failure.append(error)
            server.should_exit = True

    threading.Thread(target=begin, name="zipper-load", daemon=True).start()
    try:
        with contextlib.closing(listening):
            server.run(sockets=[listening])
    finally:
        service.close()
    if failure:
        raise failure[0]
