"""The process that a `RewardPool` runs rewards in: `python worker.py CONNECTION TRACE PARENT`.

It is a fresh interpreter: it shares no sockets, locks or devices with the training process, and does not run the
user's script again. Python's own modules are all that it imports before it is told where the others are.
"""

import ctypes
import faulthandler
import os
import pickle
import signal
import sys
import traceback
from multiprocessing.connection import Connection

PR_SET_PDEATHSIG = 1


def main(connection: Connection, trace: int, parent: int) -> None:
    """Load the rewards, say so, and answer one completion after the other until the connection ends."""
    _end_with(parent)
    for ignored in (signal.SIGINT, signal.SIGTERM):  # the training process decides; it closes the connection
        signal.signal(ignored, signal.SIG_IGN)
    faulthandler.enable(file=trace)
    faulthandler.register(signal.SIGUSR1, file=trace, all_threads=False)
    try:
        path, rewards = pickle.loads(connection.recv_bytes())
        sys.path[:] = path
        from gvpo_lightning.rewards.protocol import RAISED, Failure, RewardContractError, reward_all_at_once

        functions = {name: pickle.loads(reward) for name, reward in rewards.items()}
    except BaseException:
        connection.send(traceback.format_exc())
        return
    connection.send(None)
    while True:
        try:
            name, prompt, completion, columns = connection.recv()
        except EOFError:
            return
        answer: object
        try:
            columns = {column: [value] for column, value in columns.items()}
            answer = reward_all_at_once(name, functions[name], [prompt], [completion], columns)[0]
        except RewardContractError as error:
            answer = error
        except BaseException:  # sys.exit, or Python's own way out of a generator
            answer = Failure(RAISED, traceback.format_exc())
        connection.send(answer)


def _end_with(parent: int) -> None:
    """Have the system kill this process when the training process ends, however it ends and whatever is done here."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # whatever threads a reward has left
