"""What already has addresses on this host, asked for before a network is created."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.backends.occupied import check_free, store_occupants
from meshnet.errors import PolicyRefusedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.kernel import Kernel
    from meshnet.model import Network
    from meshnet_agent.mesh.membership import Membership
    from meshnet_agent.mesh.store_addresses import StoreAddresses
    from meshnet_agent.tasks.worker import Worker


class Occupancy:
    """Looks at etcd's addresses and at this host's links and routes."""

    def __init__(
        self,
        kernel: Worker[Kernel],
        store: StoreAddresses,
        membership: Membership,
        underlay_dev: str | None,
    ) -> None:
        self._kernel = kernel
        self._store = store
        self._membership = membership
        self._underlay_dev = underlay_dev

    async def look(self) -> Callable[[Network], None]:
        """A check of networks against what is there now.

        The check raises `PolicyRefusedError` if a network's CIDR has addresses that are in use.

        Raises:
            NotFoundError: this host has no underlay address any more.
            OSError: the kernel did not answer.
        """
        ip = self._membership.host.underlay_ip
        underlay = await self._kernel.run(lambda kernel: kernel.observe(ip, self._underlay_dev))
        occupants = (*store_occupants(self._store.all), *underlay.occupied)

        def check(network: Network) -> None:
            problem = check_free(network, occupants)
            if problem is not None:
                raise PolicyRefusedError(problem)

        return check
