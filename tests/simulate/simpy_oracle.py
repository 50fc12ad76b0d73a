"""A scenario carried out by simpy's processes and resources, as an engine would: an independent way to the same times."""

import simpy

from pipeoptim.schedule import ActionKind


def simulated_by_simpy(scenario, costs):
    """(replica, stage, action) -> when it ended."""
    return _Pipelines(scenario, costs).run()


class _Pipelines:
    def __init__(self, scenario, costs):
        self.scenario, self.costs, self.program = scenario, costs, scenario.program
        self.env = simpy.Environment()
        self.boxes, self.lines, self.complete, self.ended = {}, {}, {}, {}

    def run(self):
        for r in range(self.scenario.replicas):
            for p in range(self.program.processes or self.program.depth):
                self.env.process(self.process(r, p))
        self.env.run()
        return self.ended

    def box(self, r, k, kind, i):
        """The event of a message being there."""
        return self.boxes.setdefault((r, k, kind, i), self.env.event())

    def process(self, r, p):
        program, n = self.program, self.scenario.minibatches
        steps = [s for t in range(n) for s in program.process_step(p, t)] + program.process_drain(p, n)
        for k, (kind, i) in steps:
            cost = self.costs[k]
            if kind is ActionKind.U:
                yield from self.averaged(r, k, i, cost)
                yield self.env.timeout(cost.update)
            else:
                forward = kind is ActionKind.F
                predicts = (cost.passes.forward if forward else cost.passes.backward)[i % program.microbatches]
                yield self.env.timeout(cost.predict if predicts else 0.0)
                if k != (0 if forward else program.depth - 1):
                    yield self.box(r, k, kind, i)
                yield self.env.timeout(cost.forward if forward else cost.backward)
                target = k + 1 if forward else k - 1
                if 0 <= target < program.depth:
                    self.env.process(self.send(r, k, target, kind, i))
                if not forward and (i + 1) % program.microbatches == 0:
                    self.note_complete(r, k, i // program.microbatches)
            self.ended[r, k, kind.value, i] = self.env.now

    def send(self, r, k, target, kind, i):
        source, sink = self.program.process_of(k), self.program.process_of(target)
        if source != sink:
            boundary, size = min(k, target), self.costs[k].sent_bytes if kind is ActionKind.F else self.costs[k].returned_bytes
            line = self.lines.setdefault((r, source, sink), simpy.Resource(self.env))
            with line.request() as turn:
                yield turn
                yield self.env.timeout(size / self.scenario.bandwidths()[boundary])
            yield self.env.timeout(self.scenario.delays()[boundary])
        self.box(r, target, kind, i).succeed()

    def note_complete(self, r, k, n):
        if self.scenario.replicas == 1:
            return
        waiting, done = self.complete.setdefault((k, n), ([], self.env.event()))
        waiting.append(r)
        if len(waiting) == self.scenario.replicas:
            self.env.process(self.average(k, done))

    def average(self, k, done):
        count, link = self.scenario.replicas, self.scenario.conditions
        for _ in range(2 * (count - 1)):  # a ring: each replica's share goes round twice
            yield self.env.timeout(self.costs[k].weight_bytes / count / link.bandwidth + link.delay)
        done.succeed()

    def averaged(self, r, k, n, cost):
        if self.scenario.replicas > 1:
            yield self.complete.setdefault((k, n), ([], self.env.event()))[1]
