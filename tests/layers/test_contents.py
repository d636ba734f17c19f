"""What lies inside a layer is looked up once: every way in which it may change is seen, and nothing is kept alive."""

import copy
import gc
import weakref
from collections import UserDict

import numpy as np
import pytest

import numlstm as nl
from numlstm.autograd import Variable


class Holder(nl.Layer):
    """Layers and variables in every kind of place."""

    def __init__(self):
        super().__init__(name="holder")
        self.one = nl.Dense(1, name="one")
        self.blocks = [nl.Dense(1, name="first"), [nl.Dense(1, name="nested")]]
        self.empty = []
        self.sizes = [3, nl.Dense(1, name="behind a number")]  # opens with a number: not looked into
        self.table = {"a": nl.Dense(1, name="in a dict"), "more": {"list": []}}
        self.other = UserDict(x=nl.Dense(1, name="in a mapping"))
        self.fixed = (nl.Dense(1, name="in a tuple"), [], {})
        self.shift = Variable([0.0], name="shift")
        self.last = None


def inside(layer):
    """Names of layers and weights, by everything that tells them."""
    return (
        [name for name, _ in layer.walk()],
        [x.name for x in layer._survey().layers],
        list(layer.named_weights()),
        [w.name for w in layer.weights],
        [w.name for w in layer.trainable_weights],
        layer.has_children(),
    )


def anew(layer):
    """The same with nothing known."""
    for _, x in layer.walk():
        x._found_inside = type(x._found_inside)()
    for x in layer._survey().layers:
        x._found_inside = type(x._found_inside)()
    return inside(layer)


NEW = "the new one"


def rename_last(h):
    h.x = nl.Dense(1, name=NEW)
    inside(h)
    layer = h.x
    del h.x
    h.y = layer


CHANGES = {
    "an attribute": lambda h: setattr(h, "two", nl.Dense(1, name=NEW)),
    "an attribute replaced": lambda h: setattr(h, "one", nl.Dense(1, name=NEW)),
    "an attribute that was None": lambda h: setattr(h, "last", nl.Dense(1, name=NEW)),
    "a list replaced by an equal one, which grows": lambda h: (
        setattr(h, "empty", []),
        h.empty.append(nl.Dense(1, name=NEW)),
    ),
    "past __setattr__": lambda h: vars(h).update(one=nl.Dense(1, name=NEW)),
    "appended to a list": lambda h: h.blocks.append(nl.Dense(1, name=NEW)),
    "appended to an empty list": lambda h: h.empty.append(nl.Dense(1, name=NEW)),
    "an item of a list": lambda h: h.blocks.__setitem__(0, nl.Dense(1, name=NEW)),
    "in a list in a list": lambda h: h.blocks[1].append(nl.Dense(1, name=NEW)),
    "a list in a list replaced": lambda h: h.blocks.__setitem__(1, [nl.Dense(1, name=NEW)]),
    "the first of a list of numbers": lambda h: h.sizes.__setitem__(0, nl.Dense(1, name=NEW)),
    "in a dict": lambda h: h.table.update(b=nl.Dense(1, name=NEW)),
    "an item of a dict": lambda h: h.table.update(a=nl.Dense(1, name=NEW)),
    "in a list in a dict in a dict": lambda h: h.table["more"]["list"].append(nl.Dense(1, name=NEW)),
    "in another mapping": lambda h: h.other.update(y=nl.Dense(1, name=NEW)),
    "in a list in a tuple": lambda h: h.fixed[1].append(nl.Dense(1, name=NEW)),
    "in a dict in a tuple": lambda h: h.fixed[2].update(z=nl.Dense(1, name=NEW)),
    "in a layer inside": lambda h: setattr(h.blocks[1][0], "deep", nl.Dense(1, name=NEW)),
    "an attribute deleted": lambda h: delattr(h, "one"),
    "out of a list": lambda h: h.blocks.clear(),
    "out of a dict": lambda h: h.table.pop("a"),
    "the order of a list": lambda h: h.blocks.reverse(),
    "a key of a dict": lambda h: h.table.update(c=h.table.pop("a")),
    "the last key of a dict": lambda h: h.other.update(renamed=h.other.pop("x")),
    "the last attribute's name": rename_last,
    "a weight": lambda h: h.add_weight("w", (1,)),
    "a variable": lambda h: setattr(h, "scale", Variable([1.0], name=NEW)),
    "a variable replaced": lambda h: setattr(h, "shift", Variable([1.0], name=NEW)),
    "a variable in a list": lambda h: h.empty.append(Variable([1.0], name=NEW)),
    "a variable in a dict": lambda h: h.table.update(b=Variable([1.0], name=NEW)),
    "a layer inside built": lambda h: h.one.build((None, 2)),
    "a layer frozen": lambda h: setattr(h.table["a"], "trainable", False),
    "all frozen": lambda h: setattr(h, "trainable", False),
    "a variable frozen": lambda h: setattr(h.shift, "trainable", False),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_seen(change):
    h = Holder()
    for layer in (h.table["a"], h.blocks[0]):
        layer.build((None, 2))
    before = inside(h)
    assert inside(h) == before  # looked up, and compared
    change(h)
    after = inside(h)
    assert after != before
    assert after == anew(h)


def test_what_has_not_changed_is_not_looked_up_again():
    model = nl.Sequential([nl.LSTM(2, input_shape=(3, 1)), nl.Dense(1)])
    model.compile("adam", "mse")
    step = lambda: model.train_on_batch(np.ones((2, 3, 1)), np.ones((2, 1)))
    step()
    found = [x._looked_through().variables for x in model._survey().layers]
    step()
    model.predict(np.ones((2, 3, 1)), verbose=0)
    for layer, variables in zip(model._survey().layers, found, strict=True):
        assert layer._looked_through().variables is variables


def test_copies_look_for_themselves():
    h = Holder()
    before = inside(h)
    twin, shallow = copy.deepcopy(h), copy.copy(h)
    twin.two, shallow.three = nl.Dense(1, name="two"), nl.Dense(1, name="three")
    assert inside(h) == before
    assert inside(twin) == anew(twin)
    assert "two" in inside(twin)[0]
    assert "three" in inside(shallow)[0]
    assert not {id(x) for x in twin._survey().layers} & {id(x) for x in h._survey().layers}


def test_classes_with_ways_of_their_own_are_asked():
    class Own(nl.Layer):
        def __init__(self):
            super().__init__()
            self.hidden, self.shown = nl.Dense(1, name="hidden"), nl.Dense(1, name="shown")
            self.a, self.b = Variable([0.0], name="a"), Variable([0.0], name="b")

        def children(self):
            yield "shown", self.shown

        def own_variables(self):
            return [self.b]

        @property
        def trainable_weights(self):
            return []

    own = Own()
    members = own._survey()
    assert [x.name for x in members.layers[1:]] == ["shown"]
    assert [v.name for v in members.weights] == ["b"]
    assert members.trained == []


def test_a_layer_goes_with_its_last_reference():
    model = nl.Sequential([nl.LSTM(2, input_shape=(3, 1)), nl.Dense(1)])
    model.compile("adam", "mse")
    model.train_on_batch(np.ones((2, 3, 1)), np.ones((2, 1)))
    gone = [weakref.ref(x) for x in (model, model.layers[0], model.layers[0].kernel)]
    gc.disable()  # no cycle that would have to be found first
    try:
        del model
        assert [r() for r in gone] == [None] * 3
    finally:
        gc.enable()
