#!/usr/bin/env python
"""Train a segmentation model with PALS in sixty lines: a starting point for your own script.

    python examples/train_minimal.py my_data --model nvidia/mit-b0

`my_data` holds train/images, train/masks, the same for val, and id2label.json. Without a folder the built-in street
scenes are used, and without a model a small SegFormer with random weights. `pals-hf train` does the same with more
options, a model card and protection against lost work.
"""

import argparse

from pals_hf import PALSConfig, PALSTrainer, load_segmentation_dataset, train_fraction
from pals_hf.data import EvalTransform, TrainTransform, TransformedDataset
from pals_hf.models import build_image_processor, build_model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset_dir", nargs="?", help="Folder with the images and masks.")
    parser.add_argument("--model", help="Checkpoint to start from, on the Hub or in a folder.")
    parser.add_argument("--fraction", type=float, default=0.5, help="Share of the training images to train on.")
    parser.add_argument("--image_size", type=int, nargs=2, default=(96, 128), help="Height and width of the images.")
    parser.add_argument("--max_steps", type=int, default=500, help="Number of training steps.")
    parser.add_argument("--output_dir", default="runs/minimal", help="Folder for the checkpoint.")
    args = parser.parse_args(argv)

    data = load_segmentation_dataset(dataset_dir=args.dataset_dir)
    processor = build_image_processor(args.model, tuple(args.image_size))
    model = build_model(args.model, data.id2label)

    config = PALSConfig(
        args.output_dir,
        max_steps=args.max_steps,
        learning_rate=2e-4 if args.model else 2e-3,  # random weights need larger steps
        report_to="none",
    )
    trainer = PALSTrainer(
        model,
        config,
        train_dataset=TransformedDataset(
            train_fraction(data.train, args.fraction), TrainTransform(processor, args.image_size)
        ),
        eval_dataset=TransformedDataset(data.validation, EvalTransform(processor)),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()

    metrics = trainer.evaluate()
    for index, name in data.id2label.items():
        print(f"{name:<20}{metrics['eval_per_category_iou'][index]:>8.3f}")
    print(f"{'mean IoU':<20}{metrics['eval_mean_iou']:>8.3f}")
    print(f"\ncheckpoint: {args.output_dir}")


if __name__ == "__main__":
    main()
