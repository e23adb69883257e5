"""A producer as a beginner writes it, with redis-py alone: python plain_producer.py [COUNT]"""

import json
import os
import sys
import time

import redis

r = redis.Redis.from_url(os.environ.get("CONVEYOR_URL", "redis://localhost:6379/0"))
count = int(sys.argv[1]) if len(sys.argv) > 1 else None

number = 0
while count is None or number < count:
    number += 1
    task = {"id": number, "description": f"task {number}", "timestamp": time.time()}
    try:
        r.rpush("my_task_queue", json.dumps(task))
        print(f"pushed {task}", flush=True)
    except redis.ConnectionError:
        print("no connection, trying again in a second", flush=True)
        number -= 1
        time.sleep(1)
        continue
    time.sleep(float(os.environ.get("PAUSE", "0.3")))
