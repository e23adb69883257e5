"""Names that other libraries use for what has another name here, and the hint that an error gives for them."""

from __future__ import annotations

from collections.abc import Mapping

TASK_MEMBERS = {
    "delay": "{name}.enqueue(…)   (in async code: await {name}.aenqueue(…))",
    "apply_async": "{name}.options(delay=…, queue=…, priority=…).enqueue(…)",
    "apply": "{name}(…)   runs it here",
    "send": "{name}.enqueue(…)   (in async code: await {name}.aenqueue(…))",
    "send_with_options": "{name}.options(…).enqueue(…)",
    "message": "{name}.s(…)",
    "signature": "{name}.s(…)",
    "subtask": "{name}.s(…)",
    "si": "{name}.s(…)",
    "kiq": "await {name}.aenqueue(…)",
    "kicker": "{name}.options(…)",
    "perform_async": "{name}.enqueue(…)",
    "schedule": "{name}.options(delay='10m').enqueue(…)   or  {name}.options(at=…)",
    "retry": "raise RetryIn('30s')   in the task",
    "request": "current()   in the task: its context",
}
"""Celery, Dramatiq, RQ, arq, Taskiq, Huey: what they call on a task → what to write."""

APP_MEMBERS = {
    "send_task": "app.enqueue('name', …)",
    "enqueue_job": "await app.aenqueue('name', …)",
    "actor": "@app.task",
    "shared_task": "@app.task",
    "AsyncResult": "app.job(id)",
    "autodiscover_tasks": "Conveyor(include=['shop.*.tasks'])",
    "signature": "app.enqueue('name', …)",
    "worker_main": "async with app.worker():   or   conveyor worker MODULE:app",
    "run": "async with app.worker():   or   conveyor worker MODULE:app",
    "broker": "Conveyor('redis://…')",
    "control": "conveyor.admin.Admin(app.client)",
    "conf": "Conveyor(lease='30s', format='msgpack', …)   or, for a task, @app.task(timeout='30s', …)",
    "config_from_object": "Conveyor(lease='30s', …)",
}

APP_OPTIONS = {
    "broker": "Conveyor('redis://…')",
    "broker_url": "Conveyor('redis://…')",
    "redis_url": "Conveyor('redis://…')",
    "redis_settings": "Conveyor('redis://…')",
    "connection": "Conveyor('redis://…')",
    "backend": "keep_result='10m'   of a task: results are kept in the same Redis",
    "result_backend": "keep_result='10m'   of a task: results are kept in the same Redis",
    "imports": "include=['shop.mail']",
    "functions": "include=['shop.mail']",
    "task_serializer": "format='json'   or 'msgpack'",
    "serializer": "format='json'   or 'msgpack'",
    "queue_name": "app.queue('…')   and @app.task(queue='…')",
}

PACKAGE_NAMES = {
    "Celery": "from conveyor import Conveyor",
    "Worker": "async with app.worker():   or   conveyor worker MODULE:app",
    "shared_task": "@app.task   of an app: app = Conveyor()",
    "task": "@app.task   of an app: app = Conveyor()",
    "actor": "@app.task   of an app: app = Conveyor()",
    "group": "app.enqueue_many(add.s(i, i) for i in range(10))",
    "signature": "app.enqueue('name', …)",
    "current_task": "current()   in the task: its context",
    "get_current_job": "current()   in the task: its context",
    "Reject": "raise an exception of your own, named in @app.task(retry=Retry(give_up=(…,)))",
}
"""Names that other libraries have in their package → what to write."""

CHAINED = "A chain of tasks is not available yet. Write: context.spawn(second.s(…))   at the end of the first task"

JOB_MEMBERS = {
    "get": "job.result(timeout='5s')",
    "wait_result": "await job.aresult(timeout='5s')",
    "return_value": "job.result()",
    "wait": "job.result(timeout='5s')",
    "revoke": "job.cancel()",
    "state": "job.status()",
    "get_status": "job.status()",
    "ready": "job.status() in {'done', 'dead', 'cancelled'}",
    "is_finished": "job.status() == 'done'",
    "successful": "job.status() == 'done'",
    "failed": "job.status() == 'dead'",
    "job_id": "job.id",
    "task_id": "job.id",
}

TASK_OPTIONS = {
    "bind": "current()   in the function: the context of the job",
    "retries": "retry=5   attempts in total, or retry=Retry(attempts=5, backoff='1s')",
    "max_retries": "retry=5   attempts in total, or retry=Retry(attempts=5, backoff='1s')",
    "max_tries": "retry=5   attempts in total",
    "autoretry_for": "retry=Retry(on=(ConnectionError,))",
    "retry_for": "retry=Retry(on=(ConnectionError,))",
    "retry_backoff": "retry=Retry(backoff='1s', cap='5m')",
    "default_retry_delay": "retry=Retry(backoff='3m')",
    "min_backoff": "retry=Retry(backoff='1s', cap='5m')",
    "max_backoff": "retry=Retry(backoff='1s', cap='5m')",
    "time_limit": "timeout='30s'",
    "soft_time_limit": "timeout='30s'",
    "job_timeout": "timeout='30s'",
    "acks_late": "ack='late'   which is the default",
    "ignore_result": "keep_result=0",
    "store_results": "keep_result='10m'   which is the default",
    "result_ttl": "keep_result='10m'",
    "queue_name": "queue='…'",
    "actor_name": "name='…'",
    "task_name": "name='…'",
}

CALL_OPTIONS = {
    **{key: TASK_OPTIONS[key] for key in ("retries", "max_retries", "time_limit", "soft_time_limit", "job_timeout")},
    "countdown": "delay='10s'",
    "defer_by": "delay='10s'",
    "eta": "at=…   an aware datetime",
    "defer_until": "at=…   an aware datetime",
    "task_id": "id='…'",
    "job_id": "id='…'",
    "ttl": "expires='1h'",
    "routing_key": "queue='…'",
    "queue_name": "queue='…'",
    "result_ttl": "keep_result='10m'",
}


def no_member(owner: str, name: str, hints: Mapping[str, str], written: str = "") -> AttributeError:
    """Return the error for a member that *owner* does not have; *written* is what the caller writes for the object."""
    hint = hints.get(name, "")
    return AttributeError(
        f"{owner} has no attribute {name!r}." + (f" Write: {hint.replace('{name}', written)}" if hint else "")
    )


def refuse_unknown(call: str, given: Mapping[str, object], hints: Mapping[str, str]) -> None:
    """Raise TypeError for the first option of *given*, which *call* does not take."""
    for name in given:
        hint = f" Write: {hints[name]}" if name in hints else ""
        raise TypeError(f"{call} got an unexpected keyword argument {name!r}.{hint}")
