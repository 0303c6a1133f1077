"""Pre-trains BERT in two stages: short sequences at a large batch, re-warm-up, long sequences at half of it.

python examples/bert/train.py fit --config configs/bert-tiny.yaml
python examples/bert/train.py fit --config configs/bert-tiny.yaml --data.text /path/to/text
python examples/bert/train.py fit --config configs/bert-large-ddp.yaml --data.text /path/to/text --trainer.num_nodes 8
"""

from __future__ import annotations

from bert_data import BertData
from bert_model import BertPretraining
from lightning_lamb import LambCLI

if __name__ == "__main__":
    LambCLI(BertPretraining, BertData)
