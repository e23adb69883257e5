"""Enqueue and wait: a worker process as the server of a call. python rpc.py, in this directory"""

import subprocess
import sys

from conveyor import Conveyor, JobFailed

app = Conveyor()


@app.task(queue="rpc", timeout="10s", keep_result="1m")
def divide(a: float, b: float) -> float:
    return a / b


if __name__ == "__main__":
    worker = subprocess.Popen([sys.executable, "-m", "conveyor", "worker", "rpc:app"])
    try:
        print(divide.enqueue(1, 4).result(timeout="1m"))
        divide.options(retry=1).enqueue(1, 0).result(timeout="1m")
    except JobFailed as error:
        print(f"{error.type}: {error.message}")
    finally:
        worker.terminate()  # it drains, hands back what has not started, and exits 0
        print("the worker ended with", worker.wait())
