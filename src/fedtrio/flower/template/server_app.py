"""Runs beside the SuperLink: the whole comparison, with rounds, aggregation and checkpoints of fedtrio."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """A run folder that was broken off goes on after its last round."""
    from fedtrio.flower.server import serve

    serve(grid, context.run_config)
