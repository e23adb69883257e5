"""The plain consumer's counterpart with Conveyor: python conveyor_consumer.py [COUNT]"""

import itertools
import sys
from contextlib import suppress

from conveyor import Conveyor

app = Conveyor()  # CONVEYOR_URL, or an embedded server
tasks = app.plain_list("my_task_queue")
count = int(sys.argv[1]) if len(sys.argv) > 1 else None

# A task that fails comes back later, one that never works becomes a dead letter, and a crash here loses nothing.
with suppress(KeyboardInterrupt):  # ctrl-C hands back the task in hand
    for message in itertools.islice(tasks.consume(), count):
        with message as task:
            print(f"done {task['id']}: {task['description']}", flush=True)
