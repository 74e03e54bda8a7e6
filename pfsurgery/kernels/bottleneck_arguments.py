"""What the loops of bottlenecks are told, and where: shared with modules that import no Numba.

Numba's cache on disk does not notice a change here, see CONTRIBUTING.md.
"""

# Places in the block of 64-bit integers that the entry point reads its arguments from. The first
# is counted up by the threads.
COUNTER, UNITS, THREAD, SOURCE, TARGET, SCRATCH, SCRATCH_SIZE = range(7)
REDUCE, WEIGHTS, EXPAND, BIAS, ZEROS, RELU = range(7, 13)
PIXELS, HELD_PIXELS, POSITIONS, TARGET_PIXELS, WAIST_PIXELS = range(13, 18)
RAMP, TABLE, POOLS, LISTS = range(18, 22)
BLOCKS, BLOCK_ROWS, ROWS, COLUMNS, CHANNELS = range(22, 27)
TARGET_ROWS, TARGET_COLUMNS, OUTPUTS = range(27, 30)
STRIDE, TOP, LEFT, HELD_ROWS, HELD_COLUMNS, WIDTH, FILL = range(30, 37)
REDUCED, COUNT, WAIST, WAIST_WIDTH = range(37, 41)
WAIST_SCRATCH, POOL_COUNT, POOL_SCRATCH = range(41, 44)
# Of the kernel on tiles alone.
SUMS_SCRATCH, SHAPE_SCRATCH, COLUMN_STEP = range(44, 47)
TILES, WAIST_STARTS, WAIST_TILES = range(47, 50)
# Bytes from each result to what is added to it, 0 for nothing.
ADDED = 50
# How many images there are, and how many a thread takes at a time.
IMAGES, GROUP = 51, 52
ARGUMENTS = 53
IN_PLACE, COPY, REDUCTION = range(3)
# Of the processor's tiles: positions, numbers of each, outputs of two side by side, and bytes of
# what describes their shape.
TILE_ROWS, DEPTH, PANEL, SHAPE = 16, 32, 32, 64
# Places in the row of integers that describes a pooled run of columns.
MAXIMUM, FIRST_ROW, FIRST_COLUMN, POOL_HEIGHT, POOL_WIDTH = range(5)
COLUMN_STRIDE, VECTORS, LIST, PLACE = range(5, 9)
POOL = 9
