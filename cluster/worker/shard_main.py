"""``python -m cluster.worker.shard_main``: a shard as a subprocess; ``process_launcher`` starts it.

Exit status: 0 where the leader ended the group, 1 where the shard failed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os
import signal
import sys

from cluster.distributed.frames import ConnectionLost
from cluster.worker.shard_worker import CreateShard, create_shard, run_shard

SECRET_VARIABLE = "CLUSTER_GROUP_SECRET"

_PR_SET_PDEATHSIG = 1


def main(create_shard: CreateShard = create_shard) -> None:
    parser = argparse.ArgumentParser(description="One shard of a replica. Its secret is in the environment.")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--address", required=True, help="where the group's leader listens")
    parser.add_argument("--parent", type=int, required=True, help="process to die with")
    arguments = parser.parse_args()
    _die_with(arguments.parent)
    # Ctrl-C reaches every process of the terminal; the leader decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    secret = os.environ.pop(SECRET_VARIABLE)
    try:
        ended_by_leader = run_shard(arguments.rank, arguments.address, secret, create_shard)
    except ConnectionLost as error:
        print(f"the group's leader is lost: {error}", file=sys.stderr)
        ended_by_leader = False
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's clean-up: threads of libraries may still be in a call that nothing ends.
    os._exit(0 if ended_by_leader else 1)


def _die_with(parent: int) -> None:
    """Has the kernel kill this process when the thread that started it is gone, however that went."""
    with contextlib.suppress(OSError, AttributeError):  # not on every system; the leader's socket ends there, too
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before
        os._exit(1)


if __name__ == "__main__":
    main()
