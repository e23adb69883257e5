"""A consumer as a beginner writes it, with redis-py alone: python plain_consumer.py [COUNT]"""

import json
import os
import sys
import time

import redis

r = redis.Redis.from_url(os.environ.get("CONVEYOR_URL", "redis://localhost:6379/0"))
count = int(sys.argv[1]) if len(sys.argv) > 1 else None

done = 0
while count is None or done < count:
    try:
        found = r.blpop("my_task_queue", timeout=5)
    except redis.ConnectionError:
        print("no connection, trying again in a second", flush=True)
        time.sleep(1)
        continue
    if found is None:
        continue
    task = json.loads(found[1])
    print(f"done {task['id']}: {task['description']}", flush=True)
    done += 1
