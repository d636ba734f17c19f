"""A character model from Python: parallel streams, truncated backpropagation, generation.

Run: python examples/text.py FILE      (a UTF-8 text; the bundled tiny Shakespeare when left out)
"""

import sys

import numlstm as nl
from numlstm.data.text import Vocabulary, generate, read_text, streams

nl.set_seed(0)
text = read_text(sys.argv[1] if len(sys.argv) > 1 else "tinyshakespeare")[:200_000]
vocabulary = Vocabulary.fit(text)
x, y = streams(vocabulary.encode(text), batch_size=16)  # (16, T): row b is one unbroken stretch of the text

vectors = nl.initializers.RandomNormal(stddev=1.0)
model = nl.Sequential(
    [
        nl.Embedding(len(vocabulary), 32, embeddings_initializer=vectors, input_shape=(None,)),
        nl.LSTM(128, return_sequences=True),
        nl.Dense(len(vocabulary)),
    ]
)
model.compile(
    nl.optimizers.Adam(4e-3, global_clipnorm=1.0), nl.losses.SparseCategoricalCrossentropy(from_logits=True)
)
model.fit(x, y, batch_size=16, epochs=3, bptt_steps=64, shuffle=False)
model.save("letters.safetensors", preprocessing={"vocabulary": vocabulary.to_dict()})
print("".join(generate(model, vocabulary, "\n", 300, temperature=0.7)))
