"""Forecast a table from Python: windows, scaling from the training rows only, and the trivial forecast beside.

Run: python examples/forecast.py      (the bundled yearly sunspot numbers)
"""

import numlstm as nl
from numlstm.data.series import Series
from numlstm.data.tables import forecast_errors, read_csv

nl.set_seed(0)
table, rows = read_csv("sunspots"), 216
series = Series.fit(table, "SUNACTIVITY", ["SUNACTIVITY"], rows, window=24, horizon=1, predict="value")
windows = series.windows(table)
train, test = windows.part(0, rows), windows.part(rows, len(table))

model = nl.Sequential([nl.LSTM(32, input_shape=train.x.shape[1:]), nl.Dense(1)])
model.compile(optimizer=nl.optimizers.Adam(2e-3), loss="mse")
model.fit(train.x, series.encode(table, train), epochs=30, batch_size=16, verbose=0)

forecast = series.decode(model.predict(test.x), table, test.origin)
print("LSTM       ", forecast_errors(test.y, forecast))
print("last value ", forecast_errors(test.y, series.trivial(table, test.origin)["last value"]))
