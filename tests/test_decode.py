"""Every kind of image file against pixels made by hand."""

import struct
import zlib

import numpy as np
import pytest
from pictures import noise, png, png_chunk, saved
from PIL import Image, PngImagePlugin

from nnflow.decode import MAX_PIXELS, Decoder
from nnflow.errors import InputError, SourceError
from nnflow.sources import UnreadableImageError

RGB = noise(8, 8)
GREY = noise(8, 8, 1)


def decoded(content, size=8, **options):
    """(H, W, C) for RGB, (H, W) for grey."""
    pixels = Decoder(size=size, **options).decode(content, "some/file.png")
    assert pixels.dtype == np.uint8
    assert pixels.shape == (1 if options.get("grey") else 3, size, size)
    return pixels[0] if options.get("grey") else pixels.transpose(1, 2, 0)


def grey_of(rgb):
    """ITU-R 601 luma in exact arithmetic, rounded."""
    return np.rint(rgb.astype(np.float64) @ [0.299, 0.587, 0.114])


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_kinds_keep_every_bit(kind):
    np.testing.assert_array_equal(decoded(saved(RGB, kind)), RGB)
    np.testing.assert_array_equal(decoded(saved(GREY, kind), grey=True), GREY)
    np.testing.assert_array_equal(decoded(saved(GREY, kind)), np.stack([GREY] * 3, -1))


def test_webp_jpeg_gif():
    np.testing.assert_array_equal(decoded(saved(RGB, "WEBP", lossless=True)), RGB)
    smooth = np.add.outer(np.arange(8) * 9, np.arange(8) * 11).astype(np.uint8) + 40
    for subsampling in (0, 2):
        content = saved(np.stack([smooth] * 3, -1), "JPEG", quality=95, subsampling=subsampling)
        assert np.abs(decoded(content, grey=True).astype(int) - smooth).max() <= 4
    assert np.abs(decoded(saved(smooth, "JPEG", quality=95)).astype(int)[..., 1] - smooth).max() < 5
    np.testing.assert_array_equal(decoded(saved(GREY, "GIF"), grey=True), GREY)


def test_the_content_decides_not_the_name():
    pixels = Decoder(size=8).decode(saved(RGB, "BMP"), "lies.jpg")
    np.testing.assert_array_equal(pixels.transpose(1, 2, 0), RGB)


def test_colour_to_grey():
    got = decoded(saved(RGB), grey=True)
    assert np.abs(got - grey_of(RGB)).max() <= 0.51


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_exif_orientation_comes_out_upright(kind, orientation):
    """The stored picture is made from the upright one by the definition in the EXIF standard."""
    upright = np.full((8, 8, 3), 30, np.uint8)
    upright[:4, :4] = 220  # top left
    upright[:4, 4:] = 120  # top right: no two orientations of this look alike
    # EXIF 2.32, tag 0x0112: where row 0 and column 0 of the stored picture are to be seen
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    content = saved(np.ascontiguousarray(stored), kind, exif=exif, **options)
    assert np.abs(decoded(content).astype(int) - upright).max() <= (6 if kind == "JPEG" else 0)


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_in_either_byte_order_and_not_square(order):
    """8 wide and 4 high as stored; upright it is 4 wide, its middle square the rows 2 to 5."""
    picture = noise(4, 8)
    mark = {"<": b"II", ">": b"MM"}[order]
    other = struct.pack(order + "HHI4s", 0x010F, 2, 4, b"abc\0")
    turn = struct.pack(order + "HHIHH", 0x0112, 3, 1, 6, 0)
    exif = mark + struct.pack(order + "HIH", 42, 8, 2) + other + turn + bytes(4)
    content = saved(picture, exif=exif)
    np.testing.assert_array_equal(decoded(content, size=4), np.rot90(picture, -1)[2:6])


@pytest.mark.parametrize(
    "exif",
    [b"", b"MM", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", b"junk" * 9],
)
def test_broken_exif_is_no_reason_to_lose_an_image(exif):
    content = saved(RGB, exif=b"Exif\0\0" + exif)
    np.testing.assert_array_equal(decoded(content), RGB)


def test_palette_with_and_without_transparency():
    indices = (np.arange(64).reshape(8, 8) % 3).astype(np.uint8)
    colours = [(250, 10, 20), (30, 240, 50), (70, 60, 230)]
    image = Image.fromarray(indices)
    image = image.convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette([value for colour in colours for value in colour])
    wanted = np.array(colours, np.uint8)[indices]
    np.testing.assert_array_equal(decoded(saved(image)), wanted)
    np.testing.assert_array_equal(decoded(saved(image, "BMP")), wanted)
    np.testing.assert_array_equal(decoded(saved(image, "GIF")), wanted)

    clear = wanted.copy()
    clear[indices == 1] = (1, 2, 3)
    for kind in ("PNG", "GIF"):
        content = saved(image, kind, transparency=1)
        np.testing.assert_array_equal(decoded(content, background="#010203"), clear)
    half = decoded(saved(image, transparency=bytes([255, 128, 255])), background="black")
    assert np.abs(half[indices == 1] - np.array(colours[1]) * 128 / 255).max() <= 1
    np.testing.assert_array_equal(half[indices == 0], wanted[indices == 0])


@pytest.mark.parametrize("background", ["white", "black", "#0a141e", "tomato"])
def test_alpha_is_composed_on_the_background(background):
    rgb = {"white": (255,) * 3, "black": (0,) * 3, "#0a141e": (10, 20, 30), "tomato": (255, 99, 71)}
    alpha = noise(8, 8, 1, seed=5)
    alpha[0], alpha[1] = 0, 255
    share = (alpha / 255)[..., None]
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
        content = saved(np.dstack([RGB, alpha]), kind, **options)
        got = decoded(content, background=background)
        wanted = RGB * share + np.array(rgb[background]) * (1 - share)
        assert np.abs(got - wanted).max() <= 1
        np.testing.assert_array_equal(got[0], np.tile(rgb[background], (8, 1)))
        np.testing.assert_array_equal(got[1], RGB[1])
    grey = decoded(saved(np.dstack([GREY, alpha])), background=background)
    wanted = GREY[..., None] * share + np.array(rgb[background]) * (1 - share)
    assert np.abs(grey - wanted).max() <= 1


def test_white_is_the_default_background_and_transparent_colours_do_not_bleed():
    """Composed before scaling: black under alpha 0 must not darken its neighbours."""
    picture = np.zeros((16, 16, 4), np.uint8)
    picture[:, 8:] = 255
    assert (decoded(saved(picture), size=5) == 255).all()


def test_a_single_transparent_colour_in_every_depth():
    """tRNS of grey and RGB holds a value in the depth of the file."""
    for depth, levels in ((1, 2), (2, 4), (4, 16), (8, 256)):
        per_byte = 8 // depth
        values = np.arange(64).reshape(8, 8) % levels
        packed = values.reshape(8, -1, per_byte) @ (1 << (depth * np.arange(per_byte)[::-1]))
        clear = levels - 1 if depth < 8 else 9
        content = png(packed.astype(np.uint8), 8, depth, 0, (b"tRNS", struct.pack(">H", clear)))
        wanted = np.stack([values * 255 // (levels - 1)] * 3, -1)
        wanted[values == clear] = (1, 2, 3)
        np.testing.assert_array_equal(decoded(content, background="#010203"), wanted)
        wanted[values == clear] = 255
        np.testing.assert_array_equal(decoded(content, grey=True), wanted[..., 0])
    chosen = tuple(RGB[3, 4].tolist())
    wanted = RGB.copy()
    wanted[3, 4] = (0, 0, 255)
    content = png(RGB.reshape(8, -1), 8, 8, 2, (b"tRNS", struct.pack(">3H", *chosen)))
    np.testing.assert_array_equal(decoded(content, background="blue"), wanted)
    deep = np.stack([RGB, RGB ^ 0x55], -1)  # the lower bytes are dropped
    mark = (b"tRNS", struct.pack(">3H", *(256 * value + (value ^ 0x55) for value in chosen)))
    content = png(deep.reshape(8, -1), 8, 16, 2, mark)
    np.testing.assert_array_equal(decoded(content, background="blue"), wanted)


def test_sixteen_bit_grey_is_divided_by_257_and_rounded():
    values = np.random.default_rng(3).integers(0, 65536, (8, 8)).astype(np.uint16)
    values[0] = [0, 128, 129, 257, 385, 386, 65406, 65535]  # 128.5 is the first edge
    wanted = np.rint(values / 257.0)
    assert wanted[0].tolist() == [0, 0, 1, 1, 1, 2, 254, 255]
    for kind in ("PNG", "TIFF", "PPM"):
        np.testing.assert_array_equal(decoded(saved(values, kind), grey=True), wanted)
        np.testing.assert_array_equal(decoded(saved(values, kind))[..., 2], wanted)
    big_endian = saved(Image.frombytes("I;16B", (8, 8), values.astype(">u2").tobytes()), "TIFF")
    np.testing.assert_array_equal(decoded(big_endian, grey=True), wanted)
    int32 = saved(values.astype(np.int32), "TIFF")
    np.testing.assert_array_equal(decoded(int32, grey=True), wanted)

    mark = (b"tRNS", struct.pack(">H", 129))
    rows = values.astype(">u2").view(np.uint8)
    wanted[values == 129] = 255
    np.testing.assert_array_equal(decoded(png(rows, 8, 16, 0, mark), grey=True), wanted)


def test_sixteen_bit_colour_and_grey_with_alpha():
    deep = np.repeat(RGB, 2, axis=-1)
    np.testing.assert_array_equal(decoded(png(deep.reshape(8, -1), 8, 16, 2)), RGB)
    alpha = np.full((8, 8), 255, np.uint8)
    alpha[2] = 0
    wanted = GREY.copy()
    wanted[2] = 255
    rows = np.repeat(np.dstack([GREY, alpha]), 2, axis=-1).reshape(8, -1)
    np.testing.assert_array_equal(decoded(png(rows, 8, 16, 4), grey=True), wanted)


def test_grey_beyond_sixteen_bits_and_floats_are_refused():
    for values in (np.full((8, 8), 65536, np.int32), np.full((8, 8), -1, np.int32)):
        with pytest.raises(UnreadableImageError, match="wanted 0 to 65535"):
            decoded(saved(values, "TIFF"))
    with pytest.raises(UnreadableImageError, match="pixels of type F"):
        decoded(saved(np.zeros((8, 8), np.float32), "TIFF"))
    with pytest.raises(UnreadableImageError, match="pixels of type LAB"):
        decoded(saved(Image.new("LAB", (8, 8)), "TIFF"))


def test_one_bit():
    bits = GREY > 127
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        np.testing.assert_array_equal(decoded(saved(bits, kind), grey=True), bits * 255)


def test_cmyk():
    cmyk = noise(8, 8, 4, seed=9)
    cmyk[0, 0] = (0, 0, 0, 0)
    cmyk[0, 1] = (0, 0, 0, 255)
    cmyk[0, 2] = (0, 255, 255, 0)
    content = saved(Image.frombytes("CMYK", (8, 8), cmyk.tobytes()), "TIFF")
    ink = cmyk / 255
    wanted = 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])
    got = decoded(content)
    assert np.abs(got - wanted).max() <= 1
    assert got[0, :3].tolist() == [[255, 255, 255], [0, 0, 0], [255, 0, 0]]
    flat = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(decoded(saved(flat, "JPEG", quality=95)) - np.array([255.0, 0, 0])).max() <= 4


def test_animations_give_their_first_frame():
    frames = [Image.fromarray(noise(8, 8, seed=seed)) for seed in range(3)]
    options = {"save_all": True, "append_images": frames[1:], "duration": 40}
    np.testing.assert_array_equal(decoded(saved(frames[0], "PNG", **options)), noise(8, 8))
    np.testing.assert_array_equal(decoded(saved(frames[0], "WEBP", lossless=True, **options)), noise(8, 8))
    tiff = saved(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decoded(tiff), noise(8, 8))
    greys = [Image.fromarray(noise(8, 8, 1, seed=seed)) for seed in range(3)]
    content = saved(greys[0], "GIF", save_all=True, append_images=greys[1:])
    np.testing.assert_array_equal(decoded(content, grey=True), noise(8, 8, 1))


@pytest.mark.parametrize(("height", "width"), [(8, 12), (8, 13), (12, 8), (13, 8)])
def test_the_middle_square_is_cut_without_resampling(height, width):
    picture = noise(height, width)
    top, left = (height - 8) // 2, (width - 8) // 2
    wanted = picture[top : top + 8, left : left + 8]
    np.testing.assert_array_equal(decoded(saved(picture)), wanted)


def lanczos(size_in, size_out):
    """Rows of weights of the antialiased Lanczos-3 filter, in float64."""
    scale = max(size_in / size_out, 1)
    centres = (np.arange(size_out) + 0.5) * size_in / size_out
    x = (np.arange(size_in) + 0.5 - centres[:, None]) / scale
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("height", "width", "size"), [(32, 50, 8), (21, 21, 8), (5, 7, 8)])
def test_resampling_is_antialiased_lanczos_of_the_middle_square(height, width, size):
    """Only the middle square enters: noise outside of it would show at the edges."""
    picture = noise(height, width, 1)
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = picture[top : top + short, left : left + short].astype(np.float64)
    weights = lanczos(short, size)
    across = (square @ weights.T).round().clip(0, 255)  # Pillow rounds between the two passes
    wanted = (weights @ across).clip(0, 255)
    assert np.abs(decoded(saved(picture), size=size, grey=True) - wanted).max() <= 1.01


def photograph(height, width):
    """Smooth shapes and edges, as JPEG is made for; uint8 (H, W, 3)."""
    y, x = np.mgrid[:height, :width] / 60
    waves = [
        np.sin(x * 1.3 + 2 * y),
        np.sin(3 * x - y) * np.cos(y),
        np.where(np.sin(x + y * 2) > 0, 0.7, -0.7),
    ]
    return np.clip(128 + 110 * np.stack(waves, -1), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "size", "scale"),
    [(128, 128, 32, 2), (127, 127, 32, 1), (259, 387, 32, 4), (400, 301, 37, 4), (640, 517, 32, 8)],
)
def test_a_large_jpeg_is_reduced_while_it_is_decoded(height, width, size, scale, monkeypatch):
    """By the power of two that leaves LANCZOS a factor of 2, and to the same square as the whole image."""
    picture = photograph(height, width)
    sizes = []
    real = Image.Image.resize

    def resize(self, *rest, **options):
        sizes.append(self.size)
        return real(self, *rest, **options)

    monkeypatch.setattr(Image.Image, "resize", resize)
    jpeg = decoded(saved(picture, "JPEG", quality=95, subsampling=0), size=size)
    short = min(height, width)
    assert [max(side) for side in sizes] in ([-(-short // scale)], [-(-short // scale) + 1])
    assert min(sizes[0]) >= 2 * size or scale == 1
    top, left = (height - short) // 2, (width - short) // 2
    square = picture[top : top + short, left : left + short].astype(np.float64)
    weights = lanczos(short, size)
    wanted = np.einsum("ih,hwc,jw->ijc", weights, square, weights).clip(0, 255)
    difference = jpeg - wanted
    # Measured 0.4 to 1.5; of a square that lies one pixel of the whole image off, 4.5 to 8.6.
    assert np.sqrt((difference**2).mean()) < 2
    assert abs(difference.mean()) < 0.3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_jpeg_comes_out_upright(orientation):
    upright = photograph(300, 200)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(np.ascontiguousarray(stored), "JPEG", exif=exif, quality=95, subsampling=0)
    weights = lanczos(200, 25)
    wanted = np.einsum("ih,hwc,jw->ijc", weights, upright[50:250].astype(np.float64), weights).clip(0, 255)
    assert np.sqrt(((decoded(content, size=25) - wanted) ** 2).mean()) < 1.2


def test_a_reduced_jpeg_in_grey_and_in_cmyk():
    picture = photograph(256, 256)
    weights = lanczos(256, 32)
    grey = np.einsum("ih,hw,jw->ij", weights, grey_of(picture), weights)
    assert np.abs(decoded(saved(picture, "JPEG", quality=95), size=32, grey=True) - grey).mean() < 1
    assert np.abs(decoded(saved(picture[..., 0], "JPEG", quality=95), size=32)[..., 2]
                  - np.einsum("ih,hw,jw->ij", weights, picture[..., 0], weights)).mean() < 1  # fmt: skip
    inks = np.dstack([255 - picture, np.full((256, 256), 60, np.uint8)])
    content = saved(Image.frombytes("CMYK", (256, 256), inks.tobytes()), "JPEG", quality=95)
    wanted = np.einsum("ih,hwc,jw->ijc", weights, picture * (195 / 255), weights)
    assert np.abs(decoded(content, size=32) - wanted).mean() < 1.5


def test_pixels_instead_of_a_file():
    for grey in (False, True):
        for array, image in ((RGB, saved(RGB)), (GREY, saved(GREY)), (noise(9, 14), saved(noise(9, 14)))):
            for size in (5, 8, 11):
                np.testing.assert_array_equal(
                    decoded(array, size=size, grey=grey), decoded(image, size=size, grey=grey)
                )


def test_a_bomb_is_refused_before_it_is_decoded():
    """Warnings are errors in this suite, so Pillow's own is not tripped either."""
    for side in (8_945, 12_000, 20_000, 60_000):  # beyond ours, Pillow's warning, Pillow's error
        assert side * side > MAX_PIXELS
        head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        content = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head)
        content += png_chunk(b"IDAT", zlib.compress(bytes(100))) + png_chunk(b"IEND", b"")
        with pytest.raises(UnreadableImageError, match=f"{side} x {side} pixels; wanted at most"):
            decoded(content)
    for content in (b"P6 99999 99999 255\n", b"P5 12000 12000 255\n"):
        with pytest.raises(UnreadableImageError, match="pixels; wanted at most 80,000,000"):
            decoded(content)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_images_without_pixels(size):
    width, height = size
    gif = b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + bytes(6)
    gif += b"," + struct.pack("<4H", 0, 0, width, height) + b"\0\2\1\x2c\0;"
    bmp = bytearray(saved(RGB, "BMP"))
    bmp[18:26] = struct.pack("<ii", width, height)
    rows = [bytes(3 * width)] * height
    for content in (b"P6 %d %d 255\n" % size, gif, bytes(bmp), png(rows, width, 8, 2)):
        with pytest.raises(UnreadableImageError):
            decoded(content)


def test_text_chunks_beyond_pillows_limits():
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    with pytest.raises(UnreadableImageError, match=r"some/file\.png: damaged"):
        decoded(saved(RGB, pnginfo=text))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
def test_truncated_anywhere_is_one_error(kind):
    whole = saved(noise(40, 40), kind)
    decoded(whole)
    for length in [*range(60), *range(60, len(whole) * 3 // 4, 97)]:
        with pytest.raises(UnreadableImageError) as error:
            decoded(whole[:length])
        assert str(error.value).isprintable()
        assert error.value.path == "some/file.png"


def test_hostile_bytes_raise_nothing_else():
    random = np.random.default_rng(1)
    refused = 0
    for kind in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"):
        whole = np.frombuffer(saved(RGB, kind), np.uint8)
        for _ in range(60):
            broken = whole.copy()
            broken[random.integers(0, min(len(whole), 120), 3)] = random.integers(0, 256, 3)
            try:
                decoded(broken.tobytes())
            except UnreadableImageError:
                refused += 1
            except Warning:  # Pillow's, an error only in this suite
                continue
    assert refused > 100


@pytest.mark.parametrize("content", [b"hello", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0" * 64])
def test_what_is_no_image(content):
    with pytest.raises(SourceError, match="not an image of a known format"):
        decoded(content)
    with pytest.raises(UnreadableImageError, match="an empty file"):
        decoded(b"")


def test_parameters_outside_their_range():
    for size in (0, -1, 4097):
        with pytest.raises(InputError, match="size"):
            Decoder(size=size)
    for colour in ("no-colour", "#12", "", "#11223344", "rgba(1,2,3,4)"):
        with pytest.raises(InputError, match="#rrggbb"):
            Decoder(size=8, background=colour)
    assert Decoder(size=8, background="White") == Decoder(size=8, background="#FFF")
