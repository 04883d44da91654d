"""Every interleaving of actors on the real path code, and the shortest way to what may not happen.

How it fits together, and where to build on it:

* ``world.Explored`` is the machine's Vm in *parts* (memslots, one vCPU's TLB, who holds mmu_lock ...). A part is copied
  when it is first touched, so every action's footprint is observed, not declared. ``Blocked`` is raised by an action
  that has to wait, ``Broken`` by one that is itself a violation.
* ``actor.Actor`` is one sequence of atomic actions: ``act(vm, local)`` carries out the next and says what the actor
  remembers from then on, a hashable value. ``rest`` declares what it may still touch: the reduction relies on that, and
  every action is held to it. ``vcpu.VcpuActor`` takes the steps of a target's path; ``host.HostActor`` takes each event
  of a scenario apart (``host.EVENTS``, ``actions``).
* ``space.Space`` numbers what actors remember and what parts are; a state is a tuple of numbers. An action that was
  carried out once is looked up from then on. ``invariants.INVARIANTS`` are functions of the VM, kept in the same way.
* ``search`` walks: ``breadth_first`` (with a persistent set of one where an action is nobody else's business) and
  ``random_walks``; both give a ``Found`` with the schedule of a violation.
* ``mutant.Mutant`` transforms the path, the actions of an event, ports of the VM or facts of a fault. ``mutants`` has
  those that undo fixes of the kernel. Nothing outside of this package imports it but the command line.
* ``setup.Setting`` makes a Space of a scenario with actors, on a target.
"""
