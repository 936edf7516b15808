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
    own = os.getpid()
    _pass_over_signals()
    faulthandler.enable(file=trace)
    faulthandler.register(signal.SIGUSR1, file=trace, all_threads=False)
    try:
        path, rewards = pickle.loads(connection.recv_bytes())
        sys.path[:] = path
        from gvpo_lightning.rewards import protocol
        from gvpo_lightning.rewards.protocol import RAISED, Failure, RewardContractError

        functions = {name: pickle.loads(reward) for name, reward in rewards.items()}
        for function in functions.values():
            if hasattr(function, "warm_up"):
                function.warm_up()
    except BaseException:
        connection.send((0, traceback.format_exc()))
        return
    connection.send((0, None))
    while True:
        try:
            number, seed, name, prompt, completion, columns = connection.recv()
        except EOFError:
            return
        answer: object
        status: object = 1
        try:
            columns = {column: [value] for column, value in columns.items()}
            protocol.seed_globals(seed)  # or it would matter which worker answers, and what it has answered before
            answer = protocol.reward_all_at_once(name, functions[name], [prompt], [completion], columns)[0]
        except RewardContractError as error:
            answer = error
        except BaseException as error:  # sys.exit, or Python's own way out of a generator
            answer, status = Failure(RAISED, traceback.format_exc()), getattr(error, "code", 1)
        else:
            status = int(isinstance(answer, Failure))
        if os.getpid() != own:  # a process that the reward has forked comes back; the worker is who answers
            os._exit(status if isinstance(status, int) else int(status is not None))
        connection.send((number, answer))


def _pass_over_signals() -> None:
    """The training process decides, by closing the connection; what a reward starts meets signals as ever."""
    passed_over = (signal.SIGINT, signal.SIGTERM)
    for number in passed_over:
        signal.signal(number, lambda *_: None)  # unlike SIG_IGN, it ends with exec

    def as_ever() -> None:
        for number in passed_over:
            signal.signal(number, signal.SIG_DFL)
        wake()

    def wake() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_over)

    def wait() -> None:  # or a forked child would pass over what comes before it is as ever
        signal.pthread_sigmask(signal.SIG_BLOCK, passed_over)

    os.register_at_fork(before=wait, after_in_parent=wake, after_in_child=as_ever)


def _end_with(parent: int) -> None:
    """Have the system kill this process when the training process ends, however it ends and whatever is done here.

    On Linux it is the thread that has started this process whose end counts.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # whatever threads a reward has left
