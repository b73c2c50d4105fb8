"""Contract checks: what the training code does wrong, whatever the data.

``Contracts`` is called at each point of an attempted step, in the order of the
loop, and asks one small module a question each:

* ``clips``: is the clip where it has an effect, and of what it should be?
* ``gradients``: do gradients arrive, and are they cleared?
* ``schedule``: does the learning rate move with optimizer steps?
* ``setup``: what can be said before the first step (decay, groups, metadata)?

All are exact. A check that finds something is a finding with a stable code; a
check that has been clean for long turns itself off.
"""

from gradwatch.probe.contract.contracts import Contracts

__all__ = ["Contracts"]
