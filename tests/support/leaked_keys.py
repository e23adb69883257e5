"""Which keys a test left behind that will never go away by themselves."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

# Constant in number: they do not grow with the jobs that went through. Everything else needs a TTL.
CONSTANT = (
    "*:queues",  # the set of known queues
    "*:redaction",  # names of fields that nobody is shown: a constant of the apps
    "*:expiring",  # queues that go when nobody uses them, until somebody looks whether they are gone
    "*:outboxes",  # the tables of databases that deliver here
    "*:conf",  # what is declared of a queue, and whether it is paused
    "*:wake",  # at most one token, for whoever looks next
    "*:recent",  # the last finished jobs, capped
    "*:{/topics}:registry",  # the queues that subscribe to topics
    "*:{/topics}:counts",  # what was published to topics, of the first 10,000 by name
    "*:inbox:*",  # what the outbox of another queue delivered last: one for each pair
)


def leaked(client: Any) -> list[str]:
    """Return the names of the keys without a TTL, less the documented constant ones, sorted."""
    keys: list[bytes] = list(client.scan_iter(count=1000))
    pipeline = client.pipeline(transaction=False)
    for key in keys:
        pipeline.pttl(key)
    names = [
        key.decode("utf-8", "backslashreplace") for key, ttl in zip(keys, pipeline.execute(), strict=True) if ttl == -1
    ]
    return sorted(name for name in names if not any(fnmatchcase(name, pattern) for pattern in CONSTANT))


def complaint(names: list[str]) -> str:
    """Return what a test is told that left *names* behind."""
    shown = "\n".join(f"  {name}" for name in names[:20])
    more = f"\n  … and {len(names) - 20} more" if len(names) > 20 else ""
    return (
        f"The test left {len(names)} keys without a TTL behind:\n{shown}{more}\n"
        'Drain or purge what it made, give the key a TTL, or mark the test @pytest.mark.leaves_keys("why").'
    )
