"""A move of slots as ClusterService tells of it: the supervisor from the catalog, routers as they saw it there last."""

from common.moves import Move
from memshard.admin.v1 import cluster_pb2


def message_of(move: Move) -> cluster_pb2.Move:
    """The message."""
    message = cluster_pb2.Move(
        move_id=move.move_id,
        first_slot=move.first,
        last_slot=move.last,
        source=move.source,
        target=move.target,
        step=move.step.value,
        attempts=move.attempts,
        rows=move.rows,
        error=move.error,
    )
    if move.cutover_at is not None:
        message.cutover_time.FromDatetime(move.cutover_at)
    return message
