"""Models: Hugging Face models with PEFT adapters, cut where needed, trained by one short loop."""
