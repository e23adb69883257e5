"""A message that is published reaches every queue that subscribes: mails, an audit trail, and whoever comes later."""

from dataclasses import dataclass

from conveyor import Conveyor


@dataclass
class User:
    id: int
    name: str


app = Conveyor()
created = app.topic("user.created", User)
created.subscribe("welcome-mails")
app.topic("user.*").subscribe("user-audit")

created.publish(User(1, "Ada"), headers={"source": "web"})
app.topic("user.deleted").publish({"id": 1})
created.subscribe("newsletter")
created.publish(User(2, "Grace"))

for queue in ("welcome-mails", "user-audit", "newsletter"):
    for message in app.queue(queue).pull(10):
        with message as body:
            print(queue, message.topic, body)

for info in app.topics():
    print(info.name, "published", info.published, "subscribers", *info.subscribers)
for pattern, queues in {"user.created": ("welcome-mails", "newsletter"), "user.*": ("user-audit",)}.items():
    app.topic(pattern).unsubscribe(*queues)
app.close()
