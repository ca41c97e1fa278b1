"""The data room: LLaVA JSON to token rows, label masks and pixels. Ranks and sizes come in as integers."""
