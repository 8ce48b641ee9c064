"""The user's own CSV file: every error names its line."""

import pytest

from helpers.pictures import roots_of, write_image, write_images
from trilemma.data.specs import BySite, Manifest
from trilemma.errors import UserError

GOOD = """path,label,patient,site,split,age
a/0.png,sick,p0,north,train,7
a/1.png,well,p1,south,train,8
a/2.png,sick,p2,south,,9
a/3.png,well,p2,south,,9
a/4.png,sick,p4,north,val,9
a/5.png,well,p4,north,val,9
a/6.png,sick,p6,north,test,9
a/7.png,well,,south,test,9
"""


@pytest.fixture
def roots(tmp_path):
    made = roots_of(tmp_path)
    write_images(made.data / "set", [f"a/{i}.png" for i in range(40)])
    return made


def load(roots, text: str | bytes, **fields):
    (roots.data / "set" / "list.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return Manifest(path="set/list.csv", size=8, **fields).load(roots)


def test_a_complete_manifest(roots):
    data = load(roots, "\ufeff" + GOOD)
    assert data.classes == ("sick", "well") and data.sites == ("north", "south")
    assert [len(r) for r in (data.train, data.val, data.test)] == [4, 2, 2]
    assert data.train.sites_N.tolist() == [0, 1, 1, 1] and data.train.labels_N.tolist() == [0, 1, 0, 1]
    assert data.train.patients_N[2] == data.train.patients_N[3] and data.test.patients_N[1] == -1
    assert data.train.names_N.tolist() == ["a/0.png", "a/1.png", "a/2.png", "a/3.png"]
    assert BySite(num_clients=2).make()(data, 0).clients == ("north", "south")


def test_splits_are_made_where_none_are_given(roots):
    rows = "".join(f"a/{i}.png,{i % 2},p{i // 2}\n" for i in range(40))
    data = load(roots, "path,label,patient\n" + rows)
    groups = [set(records.patients_N) for records in (data.train, data.val, data.test)]
    assert sum(map(len, groups)) == 20 and len(set.union(*groups)) == 20
    assert data.sites == ("all",) and data.classes == ("0", "1")
    assert [len(r) for r in (data.train, data.val, data.test)] == [28, 4, 8]


def test_numeric_classes_are_in_numeric_order(roots):
    rows = "".join(f"a/{i}.png,{i % 11}\n" for i in range(40))
    data = load(roots, "path,label\n" + rows)
    assert data.classes == tuple(str(i) for i in range(11))


def test_classes_and_sites_of_equal_number_have_one_order_in_every_process(roots):
    """A set's order follows the process's hash seed, so what is equal as a number must differ in something else."""
    names = [f"{'0' * (7 - i)}1" for i in range(8)]
    rows = "".join(f"a/{i}.png,{names[i % 8]},{names[i // 5]}\n" for i in range(40))
    data = load(roots, "path,label,site\n" + rows)
    assert data.classes == data.sites == tuple(names)


def test_a_label_of_more_digits_than_python_reads_is_a_name(roots):
    rows = "".join(f"a/{i}.png,{('2', '1' * 5000)[i % 2]}\n" for i in range(40))
    assert load(roots, "path,label\n" + rows).classes == ("1" * 5000, "2")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/etc/passwd.png,sick,p9,north,train,1", "line 10: the path '/etc/passwd.png' leaves"),
        ("../a/9.png,sick,p9,north,train,1", "line 10: the path '../a/9.png' leaves"),
        ("a/../../set/a/9.png,sick,p9,north,train,1", "line 10: the path .* leaves"),
        ("C:\\a.png,sick,p9,north,train,1", "line 10: the path .* leaves"),
        ("..\\a.png,sick,p9,north,train,1", "line 10: the path .* leaves"),
        ("a/link.png,sick,p9,north,train,1", "line 10: the link 'a/link.png' leaves"),
        ("a/absent.png,sick,p9,north,train,1", "line 10: the image 'a/absent.png' does not exist"),
        ("a/folder.png,sick,p9,north,train,1", "line 10: 'a/folder.png' is not a file"),
        ("a/9.txt,sick,p9,north,train,1", "line 10: 'a/9.txt' is not a known kind"),
        ("a/9.png,,p9,north,train,1", "line 10: has no label"),
        (",sick,p9,north,train,1", "line 10: has no path"),
        ("a/9.png,sick,p9,north,trian,1", "line 10: has the split 'trian'"),
        ("a/9.png,sick,p9,north,train", "line 10: has another number of cells"),
        ("a/9.png,sick,p9,north,train,1,1", "line 10: has another number of cells"),
        ("a/0.png,sick,p9,north,train,1", "line 10: lists the image of line 2 again"),
        ("a/9.png,sick,p0,north,test,1", "line 10: patient p0 is in test here and in train in line 2"),
        ("a/9.png,sick,p9,,train,1", "line 10: has no site while others have one"),
        ('a/9.png,"sick"x,p9,north,train,1', "is not a CSV file"),
        ("a/9.png,odd,p9,north,test,1", "class 'odd' has no record"),
    ],
)
def test_a_bad_line_is_named(roots, tmp_path, line, message):
    write_image(tmp_path / "outside.png")
    (roots.data / "set/a/link.png").symlink_to(tmp_path / "outside.png")
    (roots.data / "set/a/folder.png").mkdir()
    with pytest.raises(UserError, match=message):
        load(roots, GOOD + line + "\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: has no column 'path'"),
        ("path\n", "line 1: has no column 'label'"),
        ("path,label,label\n", "has the column 'label' twice"),
        ("path,label\n", "lists no images"),
        ("path,label\na/0.png,x\na/1.png,x\n", "only one class"),
        (b"path,label\n\xff\xfe,x\n", "is not a CSV file in UTF-8"),
        (b"path,label\na\0.png,x\n", "leaves the manifest's folder|not a CSV file"),
    ],
)
def test_a_bad_file_is_named(roots, text, message):
    with pytest.raises(UserError, match=message):
        load(roots, text)


def test_a_missing_file_is_named(roots):
    with pytest.raises(UserError, match="absent.csv: cannot be read"):
        Manifest(path="absent.csv").load(roots)


def test_an_unreadable_image_is_named(roots):
    (roots.data / "set/a/3.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match="3.png"):
        load(roots, GOOD)
