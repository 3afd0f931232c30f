"""The template of model cards. This folder is installed as `pals_hf.model_cards`; the cards beside it are not."""
