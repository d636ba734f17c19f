// LSTM + Dense(1) in TensorFlow.js. The first line of input is a JSON object: units, x (batch, time, features), y,
// weights in Keras' layout, rate and epsilon of Adam. Each line after it makes one training step, answered by its loss.
'use strict';
console.warn = console.log = () => {}; // its greeting would be taken for an answer
const tf = require('@tensorflow/tfjs');

async function main() {
  let model, x, y;
  for await (const line of require('readline').createInterface({ input: process.stdin })) {
    const value = JSON.parse(line);
    let answer;
    if (!model) {
      await tf.setBackend('cpu');
      x = tf.tensor3d(value.x);
      y = tf.tensor2d(value.y);
      model = tf.sequential({
        layers: [
          // its own default for the gates is hardSigmoid
          tf.layers.lstm({ units: value.units, recurrentActivation: 'sigmoid', inputShape: x.shape.slice(1) }),
          tf.layers.dense({ units: 1 }),
        ],
      });
      model.compile({ optimizer: tf.train.adam(value.rate, 0.9, 0.999, value.epsilon), loss: 'meanSquaredError' });
      model.setWeights(value.weights.map((w) => tf.tensor(w)));
      answer = { version: tf.version.tfjs, backend: tf.getBackend(), node: process.version };
    } else {
      answer = await model.trainOnBatch(x, y);
    }
    process.stdout.write(JSON.stringify(answer) + '\n');
  }
}

main().catch((error) => {
  console.error(String(error));
  process.exit(1);
});
