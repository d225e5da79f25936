"""Past one machine: what `zipper serve` answers, from several replicas, which Ray Serve starts, watches and replaces.

    pip install "zipper-lm[ray]"
    python examples/serve_ray.py outputs/spoken-digits/model --name spoken-digits --replicas 2 --max-replicas 8

By itself it uses this machine. Where a cluster of Ray runs (`ray start`), it uses that: the model and a key's file must
then lie at the same place on each machine. A replica's name is in the header `x-zipper-replica` of its answers.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray tells its makers how it is used

import ray
from ray import serve

from zipper_lm import Engine, load
from zipper_lm.serve.app import create_app
from zipper_lm.serve.lifecycle import GRACE, is_local, warm
from zipper_lm.serve.limits import Limits
from zipper_lm.serve.service import Service
from zipper_lm.utils.interruption import terminable


class Named:
    """Middleware: an answer says which replica it is from. The request's id is told by Ray's proxy, which gave it."""

    def __init__(self, app, replica):
        self.app, self.header = app, (b"x-zipper-replica", replica.encode())

    async def __call__(self, scope, receive, send):
        async def named(message):
            if message["type"] in ("http.response.start", "websocket.accept"):
                told = [pair for pair in message.get("headers", ()) if pair[0] != b"x-request-id"]
                message = {**message, "headers": [*told, self.header]}
            await send(message)

        await self.app(scope, receive, named)


@serve.deployment(graceful_shutdown_timeout_s=GRACE)
@serve.ingress()
class Replica:
    """One process with a model, an engine and the application."""

    def __init__(self, model, slots, key_file, **how):
        key = None if key_file is None else key_of(key_file)
        self.service = Service(key=key, **how)
        engine = Engine(load(model).eval(), slots=slots, compile=False, limit=self.service.limits.documents)
        warm(engine)
        self.service.begin(engine)

    def __serve_build_asgi_app__(self):
        app = create_app(self.service)
        app.add_middleware(Named, replica=serve.get_replica_context().replica_id.unique_id)
        return app

    def check_health(self):
        """Ray asks every few seconds, and replaces a replica whose engine has failed."""
        if self.service.state == "failed":
            raise RuntimeError("the engine has failed")

    def __del__(self):
        self.service.close()


def key_of(file):
    """A replica reads it for itself: an argument would be kept in Ray's records."""
    words = Path(file).read_text(encoding="utf-8").split()
    if len(words) != 1:
        raise ValueError(f"{file}: must hold one key, got {len(words)} words")
    return words[0]


def arguments():
    parser = argparse.ArgumentParser(description="Serve a zipped model with Ray Serve.")
    parser.add_argument("model", help="folder, the same on each machine, or Hub id")
    parser.add_argument("--name", required=True, help="what clients call the model")
    parser.add_argument("--replicas", type=int, default=1, help="at least so many")
    parser.add_argument(
        "--max-replicas", type=int, help="at most so many, when requests queue; by default as --replicas"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key-file", help="file with the key that clients must have")
    parser.add_argument("--slots", type=int, default=8, help="documents that a replica writes side by side")
    parser.add_argument("--cpus", type=float, default=1, help="of each replica")
    parser.add_argument("--gpus", type=float, default=0, help="of each replica; may be a part of one")
    given = parser.parse_args()
    most = given.max_replicas or given.replicas
    if not 1 <= given.replicas <= most:
        parser.error(f"--replicas {given.replicas}: must be from 1 to --max-replicas {most}")
    if not is_local(given.host) and given.api_key_file is None:
        parser.error(f"--host {given.host}: others can reach it, so --api-key-file is needed")
    if given.api_key_file is not None:
        key_of(given.api_key_file)
    return given


def main():
    given = arguments()
    limits = Limits()
    application = Replica.options(
        ray_actor_options={"num_cpus": given.cpus, "num_gpus": given.gpus},
        # What a replica may hold, and what may wait for one; the next client is told 503.
        max_ongoing_requests=limits.documents,
        max_queued_requests=limits.documents,
        # A replica more once those that there are have as many requests as slots, and some wait.
        autoscaling_config={
            "min_replicas": given.replicas,
            "max_replicas": given.max_replicas or given.replicas,
            "target_ongoing_requests": given.slots,
        },
    ).bind(
        given.model,
        given.slots,
        given.api_key_file,
        name=given.name,
        limits=limits,
        host=given.host,
        local=is_local(given.host),
    )
    ray.init()
    serve.start(http_options={"host": given.host, "port": given.port})
    with terminable():  # after `init`, whose own handler of SIGTERM aborts
        try:
            serve.run(application, name="zipper", blocking=True)
        except KeyboardInterrupt:
            print("ending: replicas finish what they have begun")
        finally:
            serve.delete("zipper")  # and nothing else that a cluster may serve


if __name__ == "__main__":
    main()
