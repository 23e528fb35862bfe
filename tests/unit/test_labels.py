"""Class names against class names: which row of a head is which class of the data, and when that is refused."""

import unicodedata

import pytest
from timm.data import ImageNetInfo

import models  # noqa: F401  first: it mends torchvision beside a CPU torch
from models.labels import Match, match_classes, refuse_other_classes

ANIMALS = ["cat", "dog", "owl"]


def match(data, head, policy="names", *, named=True, count=None, key="teacher.classes") -> Match:
    count = len(head) if count is None else count
    return match_classes(
        data, head, count, data_named=named, what="teacher T", where="folder D", policy=policy, policy_key=key
    )


def test_the_same_list_is_worth_no_word():
    assert match(ANIMALS, ANIMALS) == Match((0, 1, 2))
    assert match(["crane", "crane"], ["crane", "crane"]) == Match((0, 1))  # ImageNet has two


def test_another_order_is_found_by_name_and_both_are_shown():
    found = match(["owl", "cat", "dog"], ANIMALS)
    assert found.rows == (2, 0, 1)  # owl is row 2 of the head
    assert found.sure and "cat, dog, owl" in found.note and "owl, cat, dog" in found.note


def test_orders_are_shown_from_where_they_differ():
    note = match([*"abcdefghij"], [*"abcdefgjih"]).note
    assert "from class 7 on j, i, h;" in note and "from class 7 on h, i, j" in note


def test_numbers_that_were_sorted_as_text_are_found_by_name():
    assert match(["0", "1", "2"], ["0", "2", "1"], named=False).rows == (0, 2, 1)
    assert match(["10", "2", "9"], ["2", "9", "10"]).rows == (2, 0, 1)


@pytest.mark.parametrize(
    ("data", "head", "parts"),
    [
        (ANIMALS, ["cat", "dog", "fox"], ["only in the data: owl; only in its head: fox", "teacher.classes=numbers"]),
        (ANIMALS, ["rose", "lily", "iris"], ["only in the data: cat, dog, owl; only in its head: rose, lily, iris"]),
        (["cat", "dog", "owls"], ANIMALS, ["'owls' is close to 'owl'"]),
        (ANIMALS, [*ANIMALS, "fox"], ["4 classes", "has 3", "only in its head: fox", "teacher.classes=subset"]),
        ([*ANIMALS, "fox"], ANIMALS, ["3 classes", "has 4", "only in the data: fox"]),
        (["a", "A"], ["A", "b"], ["only in the data: a; only in its head: b"]),  # letters in both cases are classes
        (["Cat", "cat"], ["CAT", "cat_"], ["teacher T has other classes"]),  # which is which is open
        (["crane", "hen"], ["hen", "hen"], ["hen stands more than once"]),
        (["n02012849", "n01514668"], ["crane", "cock"], ["only in the data: n02012849"]),  # a bird or a machine
        (["n01440764", "n01443537"], ["red", "green"], ["other classes"]),
        (["n01440764", "n01443537"], ["n01440764", "n01484850"], ["only in its head: n01484850"]),
    ],
)
def test_other_classes_are_refused_with_what_is_only_on_either_side(data, head, parts):
    with pytest.raises(ValueError) as error:
        match(data, head)
    assert all(part in str(error.value) for part in parts), error.value
    assert "\n" not in str(error.value)


def test_spellings_that_differ_in_case_and_underscores_are_one_name_and_said():
    found = match(["Great_White", "OWL"], ["owl", "great  white"])
    assert found.rows == (1, 0)
    assert "'Great_White' is 'great  white'" in found.note


def test_the_unicode_forms_of_a_mac_are_one_name():
    decomposed = [unicodedata.normalize("NFD", name) for name in ("Kühe", "Bär")]
    assert decomposed[0] != "Kühe"
    assert match(decomposed, ["Kühe", "Bär"]) == Match((0, 1))
    assert match(["Bär", "Kühe"], decomposed).rows == (1, 0)


@pytest.mark.parametrize(("head", "named"), [(["LABEL_0", "LABEL_1", "LABEL_2"], True), (None, True), (ANIMALS, False)])
def test_without_names_on_one_side_it_goes_by_number_and_is_not_sure(head, named):
    data = ANIMALS if named else ["0", "1", "2"]
    found = match(data, head, named=named, count=3)
    assert found.rows == (0, 1, 2) and not found.sure
    assert "class i of the data is taken to be row i" in found.note
    with pytest.raises(ValueError, match=r"has 5 classes and the data .* has 3"):
        match(data, None, named=named, count=5)


def test_numbers_in_the_order_of_text_and_a_head_without_names_leave_open_which_is_which():
    with pytest.raises(ValueError, match=r"order of text, 1, 10, 2\. Set teacher\.classes=numbers"):
        match(["1", "10", "2"], None, count=3)
    assert match(["1", "10", "2"], None, "numbers", count=3).rows == (0, 1, 2)
    assert match(["0", "1", "2"], None, count=3) == Match((0, 1, 2))  # the numbers are the rows


def test_the_escape_says_what_it_does():
    found = match(ANIMALS, ["chat", "chien", "hibou"], "numbers")
    assert found.rows == (0, 1, 2) and "teacher.classes=numbers" in found.note
    with pytest.raises(ValueError, match="needs as many"):
        match(ANIMALS, ["chat"], "numbers")


def test_a_subset_of_the_head_is_kept_by_name():
    found = match(["owl", "cat"], ANIMALS, "subset")
    assert found.rows == (2, 0) and "3 classes; the rows of the data's 2 are kept: owl, cat" in found.note
    with pytest.raises(ValueError, match="only in the data: fox"):
        match(["owl", "fox"], ANIMALS, "subset")
    assert match(["3", "17"], None, "subset", count=1000).rows == (3, 17)


IMAGENET = ImageNetInfo("imagenet-1k")
SYNSETS, WORDS = IMAGENET.label_names(), IMAGENET.label_descriptions()


def test_an_imagenet_folder_and_a_teacher_of_the_hub():
    assert WORDS.count("crane") == 2
    assert match(SYNSETS, WORDS).rows == tuple(range(1000))
    assert match(SYNSETS, [words.split(",")[0] for words in WORDS]).rows == tuple(range(1000))
    turned = SYNSETS[1:] + SYNSETS[:1]
    found = match(turned, WORDS)
    assert found.rows == (*range(1, 1000), 0) and "'n01443537' is 'goldfish, Carassius auratus'" in found.note
    assert match(WORDS, turned).rows == (999, *range(999))
    with pytest.raises(ValueError, match="other classes"):  # one word in the wrong place: not ImageNet's order
        match(SYNSETS, [*WORDS[1:], WORDS[0]])


def test_the_thousand_names_of_imagenet_with_some_made_up():
    names = list(WORDS)
    names[134], names[517] = "crane bird", "crane2"  # a list of names may hold none twice
    for data, head in ((SYNSETS, names), (names, WORDS)):
        assert match(data, head).rows == tuple(range(1000))
    names[7], names[8] = names[8], names[7]  # cock and hen
    for data, head in ((SYNSETS, names), (names, WORDS)):
        with pytest.raises(ValueError, match="other classes"):
            match(data, head)


def test_ten_classes_of_imagenet_and_a_teacher_of_all_thousand():
    ten = ["n01440764", "n02102040", "n02979186", "n03000684", "n03028079"]
    with pytest.raises(ValueError, match=r"set teacher\.classes=subset"):
        match(ten, WORDS)
    rows = tuple(SYNSETS.index(synset) for synset in ten)
    assert match(ten, WORDS, "subset").rows == rows
    assert match(ten, None, "subset", count=1000).rows == rows
    assert match([WORDS[row] for row in rows], ten).rows == (0, 1, 2, 3, 4)


def refuse(other):
    return refuse_other_classes(ANIMALS, other, what="X/meta", where="folder D", step="Train your own")


def test_what_was_made_on_other_classes_is_refused():
    assert refuse(ANIMALS) is None
    assert "does not say which classes" in refuse(None)
    with pytest.raises(ValueError, match=r"another order: owl, cat, dog there, cat, dog, owl in folder D\. Train"):
        refuse(["owl", "cat", "dog"])
    message = "only in the data: owl; only in it: Owl; 'owl' and 'Owl' differ only in case"
    with pytest.raises(ValueError, match=message):
        refuse(["cat", "dog", "Owl"])
