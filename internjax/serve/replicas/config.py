"""What the router in front of the replicas needs to know."""

from dataclasses import dataclass, field

from internjax.errors import UserError

LOST_EXIT = 70
"""Exit code of a process whose engine hung or died: EX_SOFTWARE of sysexits.h."""


@dataclass(frozen=True)
class RouterConfig:
    """How requests find a replica, and when a replica is given up.

    Fields:
      spread: requests by which the replica that knows a prompt's beginning may be busier than the
        idlest one; beyond that the idlest one answers.
      health_seconds: a replica that answers no health check for so long is killed and restarted.
    """

    spread: int = 4
    health_seconds: float = 30.0

    def __post_init__(self):
        if self.spread < 0:
            raise UserError(f"spread={self.spread}: it must be at least 0.")
        if self.health_seconds <= 0:
            raise UserError(f"health_seconds={self.health_seconds}: it must be above 0.")


@dataclass(frozen=True)
class FrontConfig:
    """The fields of a server's config that the front process itself obeys."""

    host: str
    port: int
    replicas: int
    drain_seconds: float
    max_body_bytes: int
    router: RouterConfig = field(default_factory=RouterConfig)

    def __post_init__(self):
        if self.replicas < 1:
            raise UserError(f"replicas={self.replicas}: a router needs at least 1.")
        if not 0 <= self.port < 65536:
            raise UserError(f"port={self.port}: it must lie in 0..65535, 0 lets the system choose.")
