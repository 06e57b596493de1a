"""TRACE's retain weights in a transformers Trainer: the 20 lines between the markers are all it takes.

    trace-ds run CONFIG --run-dir RUN                # or prepare, collect, calibrate
    python docs/trainer_example.py MODEL RUN OUT

Only the retain side is shown; add your own forget loss where the comment says so.
"""

from __future__ import annotations

import sys

# --- 20 lines ---
from torch.utils.data import WeightedRandomSampler
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from trace_ds.calibration.export import RetainRows, collate_rows, weighted_retain_loss

SAMPLING = False  # True: draw rows in proportion to their mean weight and leave the loss unweighted


class RetainTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weights, labels = inputs.pop("weights"), inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)  # a cache would let attention cross documents
        loss = weighted_retain_loss(outputs.logits, labels, weights.gt(0) if SAMPLING else weights, num_items_in_batch)
        if num_items_in_batch is not None:  # n is global, and the Trainer averages over the processes
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss  # + your forget loss

    def _get_train_sampler(self, train_dataset=None):
        if not SAMPLING:
            return super()._get_train_sampler(train_dataset)
        return WeightedRandomSampler(self.train_dataset.row_weight_R, len(self.train_dataset))


# --- end ---


def main(model: str, run: str, output: str, **options: object) -> Trainer:
    arguments = TrainingArguments(output, remove_unused_columns=False, report_to="none", **options)
    trainer = RetainTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        arguments,
        data_collator=collate_rows,
        train_dataset=RetainRows(run),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:4], num_train_epochs=1, per_device_train_batch_size=4, learning_rate=1e-5)
