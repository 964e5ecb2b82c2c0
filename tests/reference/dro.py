"""tDRO's weight rules written out slowly, row by row, in plain Python."""

import math


def mean_of_ratios_of_step(micro_steps, num_tasks):
    """micro_steps: lists of (loss, reference loss, task); the measurement of the released code, averaged over them."""
    total = [0.0] * num_tasks
    for rows in micro_steps:
        norm = sum(abs(reference) for _, reference, _ in rows)
        per_task = {task: [] for task in range(num_tasks)}
        for loss, reference, task in rows:
            scaled = reference / norm
            if scaled < 1e-4:
                scaled = 1.0
            per_task[task].append(max(0.0, loss / scaled))
        for task, ratios in per_task.items():
            total[task] += sum(ratios) / max(1, len(ratios))
    return [value / len(micro_steps) for value in total]


def ratio_of_means_of_step(micro_steps, num_tasks, floor=1e-2):
    """The paper's ratio over all rows of the step; None for a task without rows."""
    rows = [row for micro_step in micro_steps for row in micro_step]
    ratios = []
    for task in range(num_tasks):
        own = [(loss, reference) for loss, reference, of in rows if of == task]
        if not own:
            ratios.append(None)
            continue
        loss = sum(pair[0] for pair in own) / len(own)
        reference = sum(pair[1] for pair in own) / len(own)
        ratios.append(loss / max(reference, floor))
    return ratios


def ascend(log_weights, gradient, eta):
    """One step of unit length on the log weights, normalised; returns (log weights, weights)."""
    length = math.sqrt(sum(value * value for value in gradient))
    moved = [log_weight + eta * value / length for log_weight, value in zip(log_weights, gradient, strict=True)]
    total = math.log(sum(math.exp(value) for value in moved))
    logs = [value - total for value in moved]
    return logs, [math.exp(value) for value in logs]
