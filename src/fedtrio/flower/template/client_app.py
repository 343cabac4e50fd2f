"""Runs beside each SuperNode, in a new process for each message, and needs nothing but flwr.

Model and data are in the site's worker, `fedtrio site --local PATH`; PATH comes from this SuperNode's own
`--node-config 'fedtrio="PATH"'`. What passes here is not opened.
"""

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from relay import relay

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """The worker's answer."""
    path, content = str(context.node_config.get("fedtrio", "")), message.content
    head, body = relay(path, content["head"]["json"], content["body"]["bytes"])
    records = {"head": ConfigRecord({"json": head}), "body": ConfigRecord({"bytes": body})}
    return Message(RecordDict(records), reply_to=message)
