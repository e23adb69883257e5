"""The plain producer's counterpart with Conveyor: python conveyor_producer.py [COUNT]"""

import itertools
import os
import sys
import time
from contextlib import suppress

from conveyor import Conveyor

app = Conveyor()  # CONVEYOR_URL, or an embedded server
tasks = app.plain_list("my_task_queue")
count = int(sys.argv[1]) if len(sys.argv) > 1 else None

with suppress(KeyboardInterrupt):
    for number in itertools.islice(itertools.count(1), count):
        task = {"id": number, "description": f"task {number}", "timestamp": time.time()}
        tasks.push(task)  # waits for Redis by itself
        print(f"pushed {task}", flush=True)
        time.sleep(float(os.environ.get("PAUSE", "0.3")))
