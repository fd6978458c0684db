"""Tokenize a file of JSON lines with `datasets` and a fast tokenizer of transformers, in two processes.

`run.py --beside` starts it; by hand: python with_datasets.py FILE TOKENIZER FOLDER
"""

import os
import sys
from typing import Any


def main() -> None:
    file, tokenizer_folder, out = sys.argv[1:]
    # Read when the libraries are imported.
    os.environ |= {"HF_DATASETS_CACHE": f"{out}/cache", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    from datasets import load_dataset
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        found = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)
        return {"ids": found["input_ids"]}

    rows = load_dataset("json", data_files=file, split="train")
    rows.map(encode, batched=True, num_proc=2, remove_columns=rows.column_names).save_to_disk(f"{out}/tokens")


if __name__ == "__main__":
    main()
