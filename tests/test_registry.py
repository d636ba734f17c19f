"""Names that become objects, and configurations that are the constructor's parameters."""

import numpy as np
import pytest

from numlstm.registry import Configurable, Registry, constructor_parameters, custom_objects_scope, serialize


class Shape(Configurable):
    def __init__(self, sides: int = 3, **options):
        self.sides = sides
        self.colour = options.pop("colour", "red")
        assert not options


class Square(Shape):
    def __init__(self, size, **options):
        super().__init__(**options)
        self.size = size


class Base(Configurable):
    def __init__(self, *, name="n"):
        self.name = name


class Child(Base):
    def __init__(self, depth, **options):
        super().__init__(**options)
        self.depth = depth


class Closed(Base):
    def __init__(self, depth):
        super().__init__()
        self.depth = depth


class Forgetful(Configurable):
    def __init__(self, kept, lost):
        self.kept = kept


@pytest.fixture
def shapes():
    registry = Registry("shape")
    registry.register("quad")(Square)
    return registry


@pytest.mark.parametrize("name", ["Square", "square", "SQUARE", "quad"])
def test_a_name_is_found_in_any_spelling(shapes, name):
    assert shapes.find(name) is Square


def test_an_unknown_name_lists_the_known_and_the_closest(shapes):
    with pytest.raises(ValueError, match=r"unknown shape 'sqare': did you mean 'Square'\? Known: Square"):
        shapes.find("sqare")


def test_get_takes_names_saved_forms_objects_and_none(shapes):
    square = Square(2)
    assert shapes.get(None) is None
    assert shapes.get({"class_name": "square", "config": {"size": 4}}).size == 4
    registry = Registry("function")
    assert registry.get(len) is len
    with pytest.raises(ValueError, match="shape: got 3 of type int"):
        shapes.get(3)
    with pytest.raises(ValueError, match="class_name"):
        shapes.get({"config": {}})
    assert square.get_config()["size"] == 2


def test_custom_objects_are_known_inside_the_block_only(shapes):
    with custom_objects_scope({"Child": Child}):
        assert shapes.find("Child") is Child
        with custom_objects_scope({"Base": Base}):
            assert shapes.find("Child") is Child and shapes.find("Base") is Base
    assert "Child" not in shapes
    with pytest.raises(ValueError, match="unknown shape 'Child'"):
        shapes.find("Child")


def test_parameters_are_collected_as_far_up_as_options_are_handed():
    assert constructor_parameters(Child) == ("depth", "name")
    assert constructor_parameters(Closed) == ("depth",)


def test_config_round_trip():
    child = Child.from_config(Child(3, name="x").get_config())
    assert (child.depth, child.name) == (3, "x")
    assert repr(child) == "Child(depth=3, name='x')"


def test_a_parameter_that_was_not_kept_is_named():
    with pytest.raises(ValueError, match="Forgetful takes 'lost' but keeps no attribute"):
        Forgetful(1, 2).get_config()


def test_serialize_gives_json():
    assert serialize({"a": np.float64(0.5), "b": (np.int32(1), None), "c": np.arange(2)}) == {
        "a": 0.5,
        "b": [1, None],
        "c": [0, 1],
    }
    assert serialize(np.dtype("float32")) == "float32"
    assert serialize(len) == "len"
    with pytest.raises(ValueError, match="can't be saved"):
        serialize(lambda x: x)
