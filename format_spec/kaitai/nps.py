# From nps.ksy, SHA-256 aeaf2f459f1f04176e39bd0e5a3a19a9993e5d615a014f51fb1de389290d2d1b
# This is a generated file! Please edit source .ksy file and use kaitai-struct-compiler to rebuild
# type: ignore

import kaitaistruct
from kaitaistruct import KaitaiStruct, KaitaiStream, BytesIO
from enum import IntEnum
from nps_zstd import NpsZstd


if getattr(kaitaistruct, 'API_VERSION', (0, 9)) < (0, 11):
    raise Exception("Incompatible Kaitai Struct Python API: 0.11 or later is required, but you have %s" % (kaitaistruct.__version__))

class Nps(KaitaiStruct):
    """A `.nps` file holds a fine-tuned model as changes against a base model that it does not contain:
    header, chunk data, index, footer. The footer says where the index is, the index what the chunk
    data are. All integers are unsigned and little-endian.

    .. seealso::
       format_spec/SPEC.md, section 2: File
    """

    class Dtype(IntEnum):
        bool = 1
        u8 = 2
        i8 = 3
        u16 = 4
        i16 = 5
        u32 = 6
        i32 = 7
        u64 = 8
        i64 = 9
        f8_e4m3 = 10
        f8_e5m2 = 11
        f8_e8m0 = 12
        f16 = 13
        bf16 = 14
        f32 = 15
        f64 = 16
        c64 = 17

    class IndexCompression(IntEnum):
        raw = 0
        zstd = 1
        zstd_dictionary = 2

    class MaskCodec(IntEnum):
        empty = 0
        full = 1
        bitmask = 2
        gap8 = 3
        gap16 = 4
        drawn = 7
        parameters = 8
        coded = 9
        learned = 10

    class Op(IntEnum):
        copy = 1
        delta = 2
        new = 3

    class ValueCodec(IntEnum):
        none = 0
        replace = 1
        xor = 2
        ulp = 3
        coded_ulp = 4
        signs = 16
        levels = 17
        grid = 18
    def __init__(self, _io, _parent=None, _root=None):
        super(Nps, self).__init__(_io)
        self._parent = _parent
        self._root = _root or self
        self._read()

    def _read(self):
        self.header = Nps.Header(self._io, self, self._root)
        self._raw_chunk_data = self._io.read_bytes(self.footer.index_offset - 64)
        _io__raw_chunk_data = KaitaiStream(BytesIO(self._raw_chunk_data))
        self.chunk_data = Nps.ChunkData(_io__raw_chunk_data, self, self._root)


    def _fetch_instances(self):
        pass
        self.header._fetch_instances()
        self.chunk_data._fetch_instances()
        _ = self.footer
        if hasattr(self, '_m_footer'):
            pass
            self._m_footer._fetch_instances()

        _ = self.index_raw
        if hasattr(self, '_m_index_raw'):
            pass
            self._m_index_raw._fetch_instances()

        _ = self.index_zstd
        if hasattr(self, '_m_index_zstd'):
            pass
            self._m_index_zstd._fetch_instances()


    class BaseRecord(KaitaiStruct):
        """One tensor of the base.

        .. seealso::
           format_spec/SPEC.md, section 3.2: Base record
        """
        def __init__(self, _io, _parent=None, _root=None):
            super(Nps.BaseRecord, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self._read()

        def _read(self):
            self.name_bytes = self._io.read_u2le()
            if not self.name_bytes >= 1:
                raise kaitaistruct.ValidationLessThanError(1, self.name_bytes, self._io, u"/types/base_record/seq/0")
            if not self.name_bytes <= 512:
                raise kaitaistruct.ValidationGreaterThanError(512, self.name_bytes, self._io, u"/types/base_record/seq/0")
            self.dtype = KaitaiStream.resolve_enum(Nps.Dtype, self._io.read_u1())
            if not isinstance(self.dtype, Nps.Dtype):
                raise kaitaistruct.ValidationNotInEnumError(self.dtype, self._io, u"/types/base_record/seq/1")
            self.rank = self._io.read_u1()
            if not self.rank <= 8:
                raise kaitaistruct.ValidationGreaterThanError(8, self.rank, self._io, u"/types/base_record/seq/2")
            self.reserved = self._io.read_bytes(4)
            if not self.reserved == b"\x00\x00\x00\x00":
                raise kaitaistruct.ValidationNotEqualError(b"\x00\x00\x00\x00", self.reserved, self._io, u"/types/base_record/seq/3")
            self._raw_shape = self._io.read_bytes(64)
            _io__raw_shape = KaitaiStream(BytesIO(self._raw_shape))
            self.shape = Nps.Shape(self.rank, _io__raw_shape, self, self._root)
            self.digest = self._io.read_bytes(self._parent.head.digest_bytes)
            if self._parent.head.digest_bytes == 8:
                pass
                self.digest_rest = self._io.read_bytes(24)
                if not self.digest_rest == b"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00":
                    raise kaitaistruct.ValidationNotEqualError(b"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", self.digest_rest, self._io, u"/types/base_record/seq/6")



        def _fetch_instances(self):
            pass
            self.shape._fetch_instances()
            if self._parent.head.digest_bytes == 8:
                pass



    class Chunk(KaitaiStruct):
        """One chunk as it is stored.

        .. seealso::
           format_spec/SPEC.md, section 2.2: Chunk data
        """
        def __init__(self, record, _io, _parent=None, _root=None):
            super(Nps.Chunk, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self.record = record
            self._read()

        def _read(self):
            if (not (self.record.is_parameters)):
                pass
                self.mask = self._io.read_bytes(self.record.mask_stored_bytes)

            if  ((self.record.is_parameters) and (self.record.tensor.is_signs) and (self.record.mask_compressed == 0)) :
                pass
                self._raw_signs_raw = self._io.read_bytes(self.record.mask_stored_bytes)
                _io__raw_signs_raw = KaitaiStream(BytesIO(self._raw_signs_raw))
                self.signs_raw = Nps.SignsParameters(self.record, _io__raw_signs_raw, self, self._root)

            if  ((self.record.is_parameters) and (self.record.tensor.is_signs) and (self.record.mask_compressed == 1)) :
                pass
                self._raw__raw_signs_zstd = self._io.read_bytes(self.record.mask_stored_bytes)
                _process = NpsZstd(self.record.mask_raw_bytes)
                self._raw_signs_zstd = _process.decode(self._raw__raw_signs_zstd)
                _io__raw_signs_zstd = KaitaiStream(BytesIO(self._raw_signs_zstd))
                self.signs_zstd = Nps.SignsParameters(self.record, _io__raw_signs_zstd, self, self._root)

            if  ((self.record.is_parameters) and (self.record.tensor.is_grid) and (self.record.mask_compressed == 0)) :
                pass
                self._raw_grid_raw = self._io.read_bytes(self.record.mask_stored_bytes)
                _io__raw_grid_raw = KaitaiStream(BytesIO(self._raw_grid_raw))
                self.grid_raw = Nps.GridParameters(self.record, _io__raw_grid_raw, self, self._root)

            if  ((self.record.is_parameters) and (self.record.tensor.is_grid) and (self.record.mask_compressed == 1)) :
                pass
                self._raw__raw_grid_zstd = self._io.read_bytes(self.record.mask_stored_bytes)
                _process = NpsZstd(self.record.mask_raw_bytes)
                self._raw_grid_zstd = _process.decode(self._raw__raw_grid_zstd)
                _io__raw_grid_zstd = KaitaiStream(BytesIO(self._raw_grid_zstd))
                self.grid_zstd = Nps.GridParameters(self.record, _io__raw_grid_zstd, self, self._root)

            if  ((self.record.is_parameters) and ((not (self.record.tensor.has_bits)))) :
                pass
                self._raw_levels = self._io.read_bytes(self.record.mask_stored_bytes)
                _io__raw_levels = KaitaiStream(BytesIO(self._raw_levels))
                self.levels = Nps.LevelsParameters(_io__raw_levels, self, self._root)

            if self.record.has_distances:
                pass
                self._raw_tokens = self._io.read_bytes(self.record.plane_stored_bytes[0])
                _io__raw_tokens = KaitaiStream(BytesIO(self._raw_tokens))
                self.tokens = Nps.Tokens(self.record, _io__raw_tokens, self, self._root)

            if self.record.has_distances:
                pass
                self.low_bits = self._io.read_bytes(self.record.plane_stored_bytes[1])

            self.planes = []
            for i in range((0 if self.record.tensor.is_coded_ulp else self.record.tensor.width)):
                self.planes.append(self._io.read_bytes(self.record.plane_stored_bytes[i]))

            self.padding = []
            for i in range((8 - self._io.pos() % 8) % 8):
                self.padding.append(self._io.read_u1())
                if not self.padding[i] == 0:
                    raise kaitaistruct.ValidationNotEqualError(0, self.padding[i], self._io, u"/types/chunk/seq/9")



        def _fetch_instances(self):
            pass
            if (not (self.record.is_parameters)):
                pass

            if  ((self.record.is_parameters) and (self.record.tensor.is_signs) and (self.record.mask_compressed == 0)) :
                pass
                self.signs_raw._fetch_instances()

            if  ((self.record.is_parameters) and (self.record.tensor.is_signs) and (self.record.mask_compressed == 1)) :
                pass
                self.signs_zstd._fetch_instances()

            if  ((self.record.is_parameters) and (self.record.tensor.is_grid) and (self.record.mask_compressed == 0)) :
                pass
                self.grid_raw._fetch_instances()

            if  ((self.record.is_parameters) and (self.record.tensor.is_grid) and (self.record.mask_compressed == 1)) :
                pass
                self.grid_zstd._fetch_instances()

            if  ((self.record.is_parameters) and ((not (self.record.tensor.has_bits)))) :
                pass
                self.levels._fetch_instances()

            if self.record.has_distances:
                pass
                self.tokens._fetch_instances()

            if self.record.has_distances:
                pass

            for i in range(len(self.planes)):
                pass

            for i in range(len(self.padding)):
                pass


        @property
        def grid(self):
            if hasattr(self, '_m_grid'):
                return self._m_grid

            if  ((self.record.is_parameters) and (self.record.tensor.is_grid)) :
                pass
                self._m_grid = (self.grid_raw if self.record.mask_compressed == 0 else self.grid_zstd)

            return getattr(self, '_m_grid', None)

        @property
        def signs(self):
            if hasattr(self, '_m_signs'):
                return self._m_signs

            if  ((self.record.is_parameters) and (self.record.tensor.is_signs)) :
                pass
                self._m_signs = (self.signs_raw if self.record.mask_compressed == 0 else self.signs_zstd)

            return getattr(self, '_m_signs', None)


    class ChunkData(KaitaiStruct):
        """Nothing else lies between header and index.

        .. seealso::
           format_spec/SPEC.md, section 2.2: Chunk data
        """
        def __init__(self, _io, _parent=None, _root=None):
            super(Nps.ChunkData, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self._read()

        def _read(self):
            self.tensors = []
            for i in range(len(self._root.index.tensor_chunks)):
                self.tensors.append(Nps.Chunks(self._root.index.tensor_chunks[i], self._io, self, self._root))

            self.files = []
            for i in range(len(self._root.index.file_chunks)):
                self.files.append(Nps.Chunks(self._root.index.file_chunks[i], self._io, self, self._root))

            self.check_end = self._io.read_bytes(0)
            _ = self.check_end
            if not self._io.is_eof():
                raise kaitaistruct.ValidationExprError(self.check_end, self._io, u"/types/chunk_data/seq/2")


        def _fetch_instances(self):
            pass
            for i in range(len(self.tensors)):
                pass
                self.tensors[i]._fetch_instances()

            for i in range(len(self.files)):
                pass
                self.files[i]._fetch_instances()



    class ChunkRecord(KaitaiStruct):
        """A stream that is not compressed is stored in its raw size; a compressed one in fewer bytes,
        but at least 1/32768 of them.

        .. seealso::
           format_spec/SPEC.md, section 3.5: Chunk record
        """
        def __init__(self, tensor, number, raw_bytes, _io, _parent=None, _root=None):
            super(Nps.ChunkRecord, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self.tensor = tensor
            self.number = number
            self.raw_bytes = raw_bytes
            self._read()

        def _read(self):
            self.mask_stored_bytes = self._io.read_u4le()
            self.mask_raw_bytes = self._io.read_u4le()
            self.nnz = self._io.read_u4le()
            if not self.nnz <= self.elements:
                raise kaitaistruct.ValidationGreaterThanError(self.elements, self.nnz, self._io, u"/types/chunk_record/seq/2")
            self.mask_codec = KaitaiStream.resolve_enum(Nps.MaskCodec, self._io.read_u1())
            _ = self.mask_codec
            if not (_ == Nps.MaskCodec.parameters if self.is_parameters else (_ == Nps.MaskCodec.drawn if self.tensor.is_signs else (_ == (Nps.MaskCodec.empty if self.nnz == 0 else Nps.MaskCodec.coded) if self.tensor.is_grid else ( ((_ == Nps.MaskCodec.full) and (self.nnz == self.elements))  if self.tensor.has_parameters else (_ == Nps.MaskCodec.empty if self.nnz == 0 else (_ == Nps.MaskCodec.full if self.nnz == self.elements else  ((_ == Nps.MaskCodec.bitmask) or (_ == Nps.MaskCodec.gap8) or (_ == Nps.MaskCodec.gap16) or (_ == Nps.MaskCodec.learned)) )))))):
                raise kaitaistruct.ValidationExprError(self.mask_codec, self._io, u"/types/chunk_record/seq/3")
            self.check_full = self._io.read_bytes(0)
            _ = self.check_full
            if not  ((self.tensor.op != Nps.Op.new) or (self.mask_codec == Nps.MaskCodec.full)) :
                raise kaitaistruct.ValidationExprError(self.check_full, self._io, u"/types/chunk_record/seq/4")
            self.mask_compressed = self._io.read_u1()
            if not self.mask_compressed <= (0 if  ((self.mask_codec == Nps.MaskCodec.coded) or (self.mask_codec == Nps.MaskCodec.learned))  else 1):
                raise kaitaistruct.ValidationGreaterThanError((0 if  ((self.mask_codec == Nps.MaskCodec.coded) or (self.mask_codec == Nps.MaskCodec.learned))  else 1), self.mask_compressed, self._io, u"/types/chunk_record/seq/5")
            self.planes_compressed = self._io.read_u1()
            if not self.planes_compressed <= (0 if  ((self.tensor.has_bits) or (self.tensor.is_coded_ulp))  else (1 << self.planes) - 1):
                raise kaitaistruct.ValidationGreaterThanError((0 if  ((self.tensor.has_bits) or (self.tensor.is_coded_ulp))  else (1 << self.planes) - 1), self.planes_compressed, self._io, u"/types/chunk_record/seq/6")
            self.reserved = self._io.read_bytes(1)
            if not self.reserved == b"\x00":
                raise kaitaistruct.ValidationNotEqualError(b"\x00", self.reserved, self._io, u"/types/chunk_record/seq/7")
            self.check_mask_raw_bytes = self._io.read_bytes(0)
            _ = self.check_mask_raw_bytes
            if not (( ((self.mask_raw_bytes >= self.exponents + 32) and (self.mask_raw_bytes <= (self.exponents + 16) + 16 * 64) and ((self.mask_raw_bytes - self.exponents) % 16 == 0))  if self.tensor.is_signs else (self.mask_raw_bytes == self.exponents + 16 if self.tensor.is_grid else self.mask_raw_bytes == 2)) if self.is_parameters else (self.mask_raw_bytes == (self.elements + 7) // 8 if self.mask_codec == Nps.MaskCodec.bitmask else ( ((self.mask_raw_bytes >= self.nnz) and (self.mask_raw_bytes <= self.nnz + (self.elements - self.nnz) // 255))  if self.mask_codec == Nps.MaskCodec.gap8 else ( ((self.mask_raw_bytes % 2 == 0) and (self.mask_raw_bytes >= 2 * self.nnz) and (self.mask_raw_bytes <= 2 * (self.nnz + (self.elements - self.nnz) // 65535)))  if self.mask_codec == Nps.MaskCodec.gap16 else ( ((self.mask_raw_bytes % 4 == 0) and (self.mask_raw_bytes >= 8) and (self.mask_raw_bytes <= 8 + 60 * self.elements))  if self.mask_codec == Nps.MaskCodec.coded else ( ((self.mask_raw_bytes % 4 == 0) and (self.mask_raw_bytes >= 8) and (self.mask_raw_bytes <= 8 + 4 * self.elements))  if self.mask_codec == Nps.MaskCodec.learned else self.mask_raw_bytes == 0)))))):
                raise kaitaistruct.ValidationExprError(self.check_mask_raw_bytes, self._io, u"/types/chunk_record/seq/8")
            self.check_mask_stored_bytes = self._io.read_bytes(0)
            _ = self.check_mask_stored_bytes
            if not (self.mask_stored_bytes == self.mask_raw_bytes if self.mask_compressed == 0 else  ((self.mask_stored_bytes < self.mask_raw_bytes) and (self.mask_stored_bytes * 32768 >= self.mask_raw_bytes)) ):
                raise kaitaistruct.ValidationExprError(self.check_mask_stored_bytes, self._io, u"/types/chunk_record/seq/9")
            self.plane_stored_bytes = []
            for i in range(8):
                self.plane_stored_bytes.append(self._io.read_u4le())
                _ = self.plane_stored_bytes[i]
                if not (_ == 0 if i >= self.planes else ((_ == 0 if self.nnz == 0 else ( ((_ >= 22) and (_ <= 8401 + 2 * self.nnz))  if i == 0 else _ <= (self.nnz * (8 * self.tensor.width - 2) + 7) // 8)) if self.tensor.is_coded_ulp else (_ == self.plane_raw_bytes if self.planes_compressed >> i & 1 == 0 else  ((_ < self.plane_raw_bytes) and (_ * 32768 >= self.plane_raw_bytes)) ))):
                    raise kaitaistruct.ValidationExprError(self.plane_stored_bytes[i], self._io, u"/types/chunk_record/seq/10")

            self.digest64 = self._io.read_bytes(8)
            self.check_end_raw_bytes = self._io.read_bytes(0)
            _ = self.check_end_raw_bytes
            if not self.end_raw_bytes <= 256 * (self._root.footer.index_offset - 64) + 67108864:
                raise kaitaistruct.ValidationExprError(self.check_end_raw_bytes, self._io, u"/types/chunk_record/seq/12")


        def _fetch_instances(self):
            pass
            for i in range(len(self.plane_stored_bytes)):
                pass


        @property
        def elements(self):
            """Number of elements of the chunk."""
            if hasattr(self, '_m_elements'):
                return self._m_elements

            self._m_elements = (0 if self.is_parameters else (self.elements_from_here if self.elements_from_here < self.tensor.chunk_elements else self.tensor.chunk_elements))
            return getattr(self, '_m_elements', None)

        @property
        def elements_from_here(self):
            if hasattr(self, '_m_elements_from_here'):
                return self._m_elements_from_here

            self._m_elements_from_here = self.tensor.shape.elements - (self.number - self.tensor.parameter_chunks) * self.tensor.chunk_elements
            return getattr(self, '_m_elements_from_here', None)

        @property
        def end_raw_bytes(self):
            if hasattr(self, '_m_end_raw_bytes'):
                return self._m_end_raw_bytes

            self._m_end_raw_bytes = ((self.raw_bytes + self.mask_raw_bytes) + self.planes_raw_bytes) + self.work
            return getattr(self, '_m_end_raw_bytes', None)

        @property
        def exponents(self):
            """Number of exponents among the parameters of signs or of a grid, of one byte each."""
            if hasattr(self, '_m_exponents'):
                return self._m_exponents

            self._m_exponents = 2 * (self.tensor.rows + self.tensor.columns)
            return getattr(self, '_m_exponents', None)

        @property
        def has_distances(self):
            if hasattr(self, '_m_has_distances'):
                return self._m_has_distances

            self._m_has_distances =  ((self.tensor.is_coded_ulp) and (self.nnz > 0))
            return getattr(self, '_m_has_distances', None)

        @property
        def is_parameters(self):
            """The mask stream holds parameters; there are no elements and no planes."""
            if hasattr(self, '_m_is_parameters'):
                return self._m_is_parameters

            self._m_is_parameters =  ((self.tensor.has_parameters) and (self.number == 0))
            return getattr(self, '_m_is_parameters', None)

        @property
        def most_contexts(self):
            """Contexts of distances for which plane 0 may have room."""
            if hasattr(self, '_m_most_contexts'):
                return self._m_most_contexts

            self._m_most_contexts = ((self.plane_stored_bytes[0] - 17) // 5 if self.plane_stored_bytes[0] < 337 else 64)
            return getattr(self, '_m_most_contexts', None)

        @property
        def plane_raw_bytes(self):
            """Not of coded distances."""
            if hasattr(self, '_m_plane_raw_bytes'):
                return self._m_plane_raw_bytes

            self._m_plane_raw_bytes = ((self.nnz + 7) // 8 if self.tensor.has_bits else self.nnz)
            return getattr(self, '_m_plane_raw_bytes', None)

        @property
        def planes(self):
            """Number of planes; those from here to the dtype's width on are empty."""
            if hasattr(self, '_m_planes'):
                return self._m_planes

            self._m_planes = (0 if self.is_parameters else (1 if self.tensor.has_parameters else (2 if self.tensor.is_coded_ulp else self.tensor.width)))
            return getattr(self, '_m_planes', None)

        @property
        def planes_raw_bytes(self):
            if hasattr(self, '_m_planes_raw_bytes'):
                return self._m_planes_raw_bytes

            self._m_planes_raw_bytes = (self.plane_stored_bytes[0] + self.plane_stored_bytes[1] if self.tensor.is_coded_ulp else self.planes * self.plane_raw_bytes)
            return getattr(self, '_m_planes_raw_bytes', None)

        @property
        def work(self):
            """What finding out which elements are kept, or how large their distances are, counts as, in
            bytes.
            """
            if hasattr(self, '_m_work'):
                return self._m_work

            self._m_work = (self.elements // 32 if self.mask_codec == Nps.MaskCodec.drawn else (self.elements // 4 + 4 * self.nnz if self.mask_codec == Nps.MaskCodec.coded else (self.elements // 4 if self.mask_codec == Nps.MaskCodec.learned else 0))) + (512 * self.most_contexts + self.nnz * self.tensor.width if self.has_distances else 0)
            return getattr(self, '_m_work', None)


    class ChunkRecords(KaitaiStruct):
        """The chunk records of one tensor or file.

        .. seealso::
           format_spec/SPEC.md, section 3.5: Chunk record
        """
        def __init__(self, tensor, raw_bytes, _io, _parent=None, _root=None):
            super(Nps.ChunkRecords, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self.tensor = tensor
            self.raw_bytes = raw_bytes
            self._read()

        def _read(self):
            self.chunks = []
            for i in range(self.tensor.chunks):
                self.chunks.append(Nps.ChunkRecord(self.tensor, i, (self.raw_bytes if i == 0 else self.chunks[i - 1].end_raw_bytes), self._io, self, self._root))



        def _fetch_instances(self):
            pass
            for i in range(len(self.chunks)):
                pass
                self.chunks[i]._fetch_instances()


        @property
        def end_raw_bytes(self):
            if hasattr(self, '_m_end_raw_bytes'):
                return self._m_end_raw_bytes

            self._m_end_raw_bytes = (self.raw_bytes if len(self.chunks) == 0 else self.chunks[-1].end_raw_bytes)
            return getattr(self, '_m_end_raw_bytes', None)


    class Chunks(KaitaiStruct):
        """The chunks of one tensor or file.

        .. seealso::
           format_spec/SPEC.md, section 2.2: Chunk data
        """
        def __init__(self, records, _io, _parent=None, _root=None):
            super(Nps.Chunks, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self.records = records
            self._read()

        def _read(self):
            self.chunks = []
            for i in range(len(self.records.chunks)):
                self.chunks.append(Nps.Chunk(self.records.chunks[i], self._io, self, self._root))



        def _fetch_instances(self):
            pass
            for i in range(len(self.chunks)):
                pass
                self.chunks[i]._fetch_instances()



    class Context(KaitaiStruct):
        """Tokens of elements whose base word has an exponent from the first one to the next context's.

        .. seealso::
           format_spec/SPEC.md, section 6: Value codecs
        """
        def __init__(self, number, previous, end_tokens, _io, _parent=None, _root=None):
            super(Nps.Context, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self.number = number
            self.previous = previous
            self.end_tokens = end_tokens
            self._read()

        def _read(self):
            self.first_exponent = self._io.read_u1()
            _ = self.first_exponent
            if not (_ == 0 if self.number == 0 else _ > self.previous):
                raise kaitaistruct.ValidationExprError(self.first_exponent, self._io, u"/types/context/seq/0")
            self.first_token = self._io.read_u1()
            self.num_tokens = self._io.read_u1()
            _ = self.num_tokens
            if not  ((_ >= 1) and (self.first_token + _ <= self.end_tokens)) :
                raise kaitaistruct.ValidationExprError(self.num_tokens, self._io, u"/types/context/seq/2")
            self.shares = []
            for i in range(self.num_tokens):
                self.shares.append(Nps.Share(self.first_token + i, (0 if i == 0 else self.shares[i - 1].end), self._io, self, self._root))

            self.check_shares = self._io.read_bytes(0)
            _ = self.check_shares
            if not  ((self.shares[0].share > 0) and (self.shares[-1].share > 0) and (self.shares[-1].end == 4096)) :
                raise kaitaistruct.ValidationExprError(self.check_shares, self._io, u"/types/context/seq/4")


        def _fetch_instances(self):
            pass
            for i in range(len(self.shares)):
                pass
                self.shares[i]._fetch_instances()



    class Dim(KaitaiStruct):
        """
        .. seealso::
           format_spec/SPEC.md, section 3.2: Base record
        """
        def __init__(self, is_used, nonzero, elements, columns, _io, _parent=None, _root=None):
            super(Nps.Dim, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self.is_used = is_used
            self.nonzero = nonzero
            self.elements = elements
            self.columns = columns
            self._read()

        def _read(self):
            self.size = self._io.read_u8le()
            _ = self.size
            if not  ((_ == 0) or ( ((self.is_used) and (_ <= 281474976710656 // self.nonzero)) )) :
                raise kaitaistruct.ValidationExprError(self.size, self._io, u"/types/dim/seq/0")


        def _fetch_instances(self):
            pass

        @property
        def end_columns(self):
            if hasattr(self, '_m_end_columns'):
                return self._m_end_columns

            self._m_end_columns = (self.columns * self.size if self.is_used else self.columns)
            return getattr(self, '_m_end_columns', None)

        @property
        def end_elements(self):
            if hasattr(self, '_m_end_elements'):
                return self._m_end_elements

            self._m_end_elements = (self.elements * self.size if self.is_used else self.elements)
            return getattr(self, '_m_end_elements', None)

        @property
        def end_nonzero(self):
            if hasattr(self, '_m_end_nonzero'):
                return self._m_end_nonzero

            self._m_end_nonzero = (self.nonzero if self.size == 0 else self.nonzero * self.size)
            return getattr(self, '_m_end_nonzero', None)


    class Exponents(KaitaiStruct):
        """Of the rows and columns of a tensor. They are in half octaves: an exponent e stands for the
        factor 2^(e / 2).

        .. seealso::
           format_spec/SPEC.md, section 3.9: Chunks of signs, levels and grids
        """
        def __init__(self, record, _io, _parent=None, _root=None):
            super(Nps.Exponents, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self.record = record
            self._read()

        def _read(self):
            self.size_rows = []
            for i in range(self.record.tensor.rows):
                self.size_rows.append(self._io.read_s1())
                _ = self.size_rows[i]
                if not  ((_ == -128) or ( ((_ >= -60) and (_ <= 60)) )) :
                    raise kaitaistruct.ValidationExprError(self.size_rows[i], self._io, u"/types/exponents/seq/0")

            self.size_columns = []
            for i in range(self.record.tensor.columns):
                self.size_columns.append(self._io.read_s1())
                _ = self.size_columns[i]
                if not  ((_ == -128) or ( ((_ >= -60) and (_ <= 60)) )) :
                    raise kaitaistruct.ValidationExprError(self.size_columns[i], self._io, u"/types/exponents/seq/1")

            self.importance_rows = []
            for i in range(self.record.tensor.rows):
                self.importance_rows.append(self._io.read_s1())
                if not self.importance_rows[i] >= -60:
                    raise kaitaistruct.ValidationLessThanError(-60, self.importance_rows[i], self._io, u"/types/exponents/seq/2")
                if not self.importance_rows[i] <= 60:
                    raise kaitaistruct.ValidationGreaterThanError(60, self.importance_rows[i], self._io, u"/types/exponents/seq/2")

            self.importance_columns = []
            for i in range(self.record.tensor.columns):
                self.importance_columns.append(self._io.read_s1())
                if not self.importance_columns[i] >= -60:
                    raise kaitaistruct.ValidationLessThanError(-60, self.importance_columns[i], self._io, u"/types/exponents/seq/3")
                if not self.importance_columns[i] <= 60:
                    raise kaitaistruct.ValidationGreaterThanError(60, self.importance_columns[i], self._io, u"/types/exponents/seq/3")



        def _fetch_instances(self):
            pass
            for i in range(len(self.size_rows)):
                pass

            for i in range(len(self.size_columns)):
                pass

            for i in range(len(self.importance_rows)):
                pass

            for i in range(len(self.importance_columns)):
                pass



    class FileName(KaitaiStruct):
        """A file's name, of the form `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`. Never a path.

        .. seealso::
           format_spec/SPEC.md, section 3.4: File record
        """
        def __init__(self, _io, _parent=None, _root=None):
            super(Nps.FileName, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self._read()

        def _read(self):
            self.octets = []
            i = 0
            while not self._io.is_eof():
                self.octets.append(self._io.read_u1())
                _ = self.octets[i]
                if not  (( ((_ >= 48) and (_ <= 57)) ) or ( ((_ >= 65) and (_ <= 90)) ) or ( ((_ >= 97) and (_ <= 122)) ) or ( ((i > 0) and ( ((_ == 45) or (_ == 46) or (_ == 95)) )) )) :
                    raise kaitaistruct.ValidationExprError(self.octets[i], self._io, u"/types/file_name/seq/0")
                i += 1



        def _fetch_instances(self):
            pass
            for i in range(len(self.octets)):
                pass

            _ = self.bytes
            if hasattr(self, '_m_bytes'):
                pass

            _ = self.text
            if hasattr(self, '_m_text'):
                pass


        @property
        def bytes(self):
            if hasattr(self, '_m_bytes'):
                return self._m_bytes

            _pos = self._io.pos()
            self._io.seek(0)
            self._m_bytes = self._io.read_bytes_full()
            self._io.seek(_pos)
            return getattr(self, '_m_bytes', None)

        @property
        def text(self):
            if hasattr(self, '_m_text'):
                return self._m_text

            _pos = self._io.pos()
            self._io.seek(0)
            self._m_text = (self._io.read_bytes_full()).decode(u"ASCII")
            self._io.seek(_pos)
            return getattr(self, '_m_text', None)


    class Footer(KaitaiStruct):
        """
        .. seealso::
           format_spec/SPEC.md, section 2.3: Footer
        """
        def __init__(self, _io, _parent=None, _root=None):
            super(Nps.Footer, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self._read()

        def _read(self):
            self.index_offset = self._io.read_u8le()
            _ = self.index_offset
            if not  ((_ >= 64) and (_ % 8 == 0) and (_ <= self._root._io.size() - 96)) :
                raise kaitaistruct.ValidationExprError(self.index_offset, self._io, u"/types/footer/seq/0")
            self.index_stored_bytes = self._io.read_u8le()
            if not self.index_stored_bytes == (self._root._io.size() - 96) - self.index_offset:
                raise kaitaistruct.ValidationNotEqualError((self._root._io.size() - 96) - self.index_offset, self.index_stored_bytes, self._io, u"/types/footer/seq/1")
            self.index_raw_bytes = self._io.read_u8le()
            if not self.index_raw_bytes >= 128:
                raise kaitaistruct.ValidationLessThanError(128, self.index_raw_bytes, self._io, u"/types/footer/seq/2")
            if not self.index_raw_bytes <= 1073741824:
                raise kaitaistruct.ValidationGreaterThanError(1073741824, self.index_raw_bytes, self._io, u"/types/footer/seq/2")
            self.file_bytes = self._io.read_u8le()
            if not self.file_bytes == self._root._io.size():
                raise kaitaistruct.ValidationNotEqualError(self._root._io.size(), self.file_bytes, self._io, u"/types/footer/seq/3")
            self.index_digest = self._io.read_bytes(32)
            self.major = self._io.read_u2le()
            if not self.major == self._root.header.major:
                raise kaitaistruct.ValidationNotEqualError(self._root.header.major, self.major, self._io, u"/types/footer/seq/5")
            self.minor = self._io.read_u2le()
            if not self.minor == self._root.header.minor:
                raise kaitaistruct.ValidationNotEqualError(self._root.header.minor, self.minor, self._io, u"/types/footer/seq/6")
            self.index_compression = KaitaiStream.resolve_enum(Nps.IndexCompression, self._io.read_u1())
            if not isinstance(self.index_compression, Nps.IndexCompression):
                raise kaitaistruct.ValidationNotInEnumError(self.index_compression, self._io, u"/types/footer/seq/7")
            self.reserved = self._io.read_bytes(3)
            if not self.reserved == b"\x00\x00\x00":
                raise kaitaistruct.ValidationNotEqualError(b"\x00\x00\x00", self.reserved, self._io, u"/types/footer/seq/8")
            self.dictionary_bytes = self._io.read_u4le()
            _ = self.dictionary_bytes
            if not  ((_ == 0) or (self.index_compression == Nps.IndexCompression.zstd_dictionary)) :
                raise kaitaistruct.ValidationExprError(self.dictionary_bytes, self._io, u"/types/footer/seq/9")
            self.dictionary_digest64 = self._io.read_bytes(8)
            _ = self.dictionary_digest64
            if not  ((_ == b"\x00\x00\x00\x00\x00\x00\x00\x00") or (self.index_compression == Nps.IndexCompression.zstd_dictionary)) :
                raise kaitaistruct.ValidationExprError(self.dictionary_digest64, self._io, u"/types/footer/seq/10")
            self.check_index_raw_bytes = self._io.read_bytes(0)
            _ = self.check_index_raw_bytes
            if not (self.index_raw_bytes == self.index_stored_bytes if self.index_compression == Nps.IndexCompression.raw else  ((self.index_stored_bytes < self.index_raw_bytes) and (self.index_raw_bytes <= (8 * self.index_stored_bytes + 1048576) + self.dictionary_bytes)) ):
                raise kaitaistruct.ValidationExprError(self.check_index_raw_bytes, self._io, u"/types/footer/seq/11")
            self.crc32 = self._io.read_u4le()
            self.magic_reversed = self._io.read_bytes(8)
            if not self.magic_reversed == b"\x0A\x1A\x0A\x0D\x53\x50\x4E\x89":
                raise kaitaistruct.ValidationNotEqualError(b"\x0A\x1A\x0A\x0D\x53\x50\x4E\x89", self.magic_reversed, self._io, u"/types/footer/seq/13")


        def _fetch_instances(self):
            pass


    class GridParameters(KaitaiStruct):
        """What one step of a change is worth, and in which contexts magnitudes are coded.

        .. seealso::
           format_spec/SPEC.md, section 6: Value codecs
        """
        def __init__(self, record, _io, _parent=None, _root=None):
            super(Nps.GridParameters, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self.record = record
            self._read()

        def _read(self):
            self.step = self._io.read_f8le()
            _ = self.step
            if not  ((_ > 0) and (_ <= 1.7976931348623157E+308)) :
                raise kaitaistruct.ValidationExprError(self.step, self._io, u"/types/grid_parameters/seq/0")
            self.first = self._io.read_s2le()
            self.reserved = self._io.read_bytes(6)
            if not self.reserved == b"\x00\x00\x00\x00\x00\x00":
                raise kaitaistruct.ValidationNotEqualError(b"\x00\x00\x00\x00\x00\x00", self.reserved, self._io, u"/types/grid_parameters/seq/2")
            self.exponents = Nps.Exponents(self.record, self._io, self, self._root)


        def _fetch_instances(self):
            pass
            self.exponents._fetch_instances()


    class Header(KaitaiStruct):
        """
        .. seealso::
           format_spec/SPEC.md, section 2.1: Header
        """
        def __init__(self, _io, _parent=None, _root=None):
            super(Nps.Header, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self._read()

        def _read(self):
            self.magic = self._io.read_bytes(8)
            if not self.magic == b"\x89\x4E\x50\x53\x0D\x0A\x1A\x0A":
                raise kaitaistruct.ValidationNotEqualError(b"\x89\x4E\x50\x53\x0D\x0A\x1A\x0A", self.magic, self._io, u"/types/header/seq/0")
            self.major = self._io.read_u2le()
            if not self.major == 1:
                raise kaitaistruct.ValidationNotEqualError(1, self.major, self._io, u"/types/header/seq/1")
            self.minor = self._io.read_u2le()
            self.reserved0 = self._io.read_bytes(4)
            if not self.reserved0 == b"\x00\x00\x00\x00":
                raise kaitaistruct.ValidationNotEqualError(b"\x00\x00\x00\x00", self.reserved0, self._io, u"/types/header/seq/3")
            self.required_features = self._io.read_u8le()
            if not self.required_features == 0:
                raise kaitaistruct.ValidationNotEqualError(0, self.required_features, self._io, u"/types/header/seq/4")
            self.optional_features = self._io.read_u8le()
            self.reserved1 = self._io.read_bytes(28)
            if not self.reserved1 == b"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00":
                raise kaitaistruct.ValidationNotEqualError(b"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", self.reserved1, self._io, u"/types/header/seq/6")
            self.crc32 = self._io.read_u4le()


        def _fetch_instances(self):
            pass


    class Heap(KaitaiStruct):
        """The names of all base, tensor and file records, in that order, without separators. Within each
        table names ascend strictly by their bytes.

        .. seealso::
           format_spec/SPEC.md, section 3.6: Heap and metadata
        """
        def __init__(self, _io, _parent=None, _root=None):
            super(Nps.Heap, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self._read()

        def _read(self):
            self._raw_base_names = []
            self.base_names = []
            for i in range(len(self._parent.base_records)):
                self._raw_base_names.append(self._io.read_bytes(self._parent.base_records[i].name_bytes))
                _io__raw_base_names = KaitaiStream(BytesIO(self._raw_base_names[i]))
                self.base_names.append(Nps.Name(_io__raw_base_names, self, self._root))
                _ = self.base_names[i]
                if not  ((i == 0) or (_.bytes > self.base_names[i - 1].bytes)) :
                    raise kaitaistruct.ValidationExprError(self.base_names[i], self._io, u"/types/heap/seq/0")

            self._raw_tensor_names = []
            self.tensor_names = []
            for i in range(len(self._parent.tensor_records)):
                self._raw_tensor_names.append(self._io.read_bytes(self._parent.tensor_records[i].name_bytes))
                _io__raw_tensor_names = KaitaiStream(BytesIO(self._raw_tensor_names[i]))
                self.tensor_names.append(Nps.Name(_io__raw_tensor_names, self, self._root))
                _ = self.tensor_names[i]
                if not  ((i == 0) or (_.bytes > self.tensor_names[i - 1].bytes)) :
                    raise kaitaistruct.ValidationExprError(self.tensor_names[i], self._io, u"/types/heap/seq/1")

            self._raw_file_names = []
            self.file_names = []
            for i in range(len(self._parent.file_records)):
                self._raw_file_names.append(self._io.read_bytes(self._parent.file_records[i].name_bytes))
                _io__raw_file_names = KaitaiStream(BytesIO(self._raw_file_names[i]))
                self.file_names.append(Nps.FileName(_io__raw_file_names, self, self._root))
                _ = self.file_names[i]
                if not  ((i == 0) or (_.bytes > self.file_names[i - 1].bytes)) :
                    raise kaitaistruct.ValidationExprError(self.file_names[i], self._io, u"/types/heap/seq/2")

            self.check_end = self._io.read_bytes(0)
            _ = self.check_end
            if not self._io.is_eof():
                raise kaitaistruct.ValidationExprError(self.check_end, self._io, u"/types/heap/seq/3")


        def _fetch_instances(self):
            pass
            for i in range(len(self.base_names)):
                pass
                self.base_names[i]._fetch_instances()

            for i in range(len(self.tensor_names)):
                pass
                self.tensor_names[i]._fetch_instances()

            for i in range(len(self.file_names)):
                pass
                self.file_names[i]._fetch_instances()



    class Index(KaitaiStruct):
        """Head, then five tables and two texts, end to end, nothing else.

        .. seealso::
           format_spec/SPEC.md, section 3: Index
        """
        def __init__(self, _io, _parent=None, _root=None):
            super(Nps.Index, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self._read()

        def _read(self):
            self.head = Nps.IndexHead(self._io, self, self._root)
            self.base_records = []
            for i in range(self.head.base_records):
                self.base_records.append(Nps.BaseRecord(self._io, self, self._root))

            self.tensor_records = []
            for i in range(self.head.tensor_records):
                self.tensor_records.append(Nps.TensorRecord(False, (0 if i == 0 else self.tensor_records[i - 1].end_chunk), self._io, self, self._root))

            self.file_records = []
            for i in range(self.head.file_records):
                self.file_records.append(Nps.TensorRecord(True, (self.end_tensor_chunk if i == 0 else self.file_records[i - 1].end_chunk), self._io, self, self._root))

            self.check_chunk_records = self._io.read_bytes(0)
            _ = self.check_chunk_records
            if not self.head.chunk_records == self.end_chunk:
                raise kaitaistruct.ValidationExprError(self.check_chunk_records, self._io, u"/types/index/seq/4")
            self.tensor_chunks = []
            for i in range(self.head.tensor_records):
                self.tensor_chunks.append(Nps.ChunkRecords(self.tensor_records[i], (0 if i == 0 else self.tensor_chunks[i - 1].end_raw_bytes), self._io, self, self._root))

            self.file_chunks = []
            for i in range(self.head.file_records):
                self.file_chunks.append(Nps.ChunkRecords(self.file_records[i], (self.end_tensor_raw_bytes if i == 0 else self.file_chunks[i - 1].end_raw_bytes), self._io, self, self._root))

            self._raw_heap = self._io.read_bytes(self.head.heap_bytes)
            _io__raw_heap = KaitaiStream(BytesIO(self._raw_heap))
            self.heap = Nps.Heap(_io__raw_heap, self, self._root)
            self.metadata = (self._io.read_bytes(self.head.metadata_bytes)).decode(u"UTF-8")
            _ = self.metadata
            if not  ((len(_) >= 2) and (_[0:1] == u"{")) :
                raise kaitaistruct.ValidationExprError(self.metadata, self._io, u"/types/index/seq/8")


        def _fetch_instances(self):
            pass
            self.head._fetch_instances()
            for i in range(len(self.base_records)):
                pass
                self.base_records[i]._fetch_instances()

            for i in range(len(self.tensor_records)):
                pass
                self.tensor_records[i]._fetch_instances()

            for i in range(len(self.file_records)):
                pass
                self.file_records[i]._fetch_instances()

            for i in range(len(self.tensor_chunks)):
                pass
                self.tensor_chunks[i]._fetch_instances()

            for i in range(len(self.file_chunks)):
                pass
                self.file_chunks[i]._fetch_instances()

            self.heap._fetch_instances()

        @property
        def end_chunk(self):
            """Number of chunks that the shapes of all tensors and files ask for."""
            if hasattr(self, '_m_end_chunk'):
                return self._m_end_chunk

            self._m_end_chunk = (self.end_tensor_chunk if len(self.file_records) == 0 else self.file_records[-1].end_chunk)
            return getattr(self, '_m_end_chunk', None)

        @property
        def end_tensor_chunk(self):
            """Number of chunks of all tensors."""
            if hasattr(self, '_m_end_tensor_chunk'):
                return self._m_end_tensor_chunk

            self._m_end_tensor_chunk = (0 if len(self.tensor_records) == 0 else self.tensor_records[-1].end_chunk)
            return getattr(self, '_m_end_tensor_chunk', None)

        @property
        def end_tensor_raw_bytes(self):
            """Sum of the raw sizes of all masks and planes of all tensors, and work."""
            if hasattr(self, '_m_end_tensor_raw_bytes'):
                return self._m_end_tensor_raw_bytes

            self._m_end_tensor_raw_bytes = (0 if len(self.tensor_chunks) == 0 else self.tensor_chunks[-1].end_raw_bytes)
            return getattr(self, '_m_end_tensor_raw_bytes', None)


    class IndexHead(KaitaiStruct):
        """
        .. seealso::
           format_spec/SPEC.md, section 3.1: Head
        """
        def __init__(self, _io, _parent=None, _root=None):
            super(Nps.IndexHead, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self._read()

        def _read(self):
            self.base_records = self._io.read_u4le()
            if not self.base_records <= 1048576:
                raise kaitaistruct.ValidationGreaterThanError(1048576, self.base_records, self._io, u"/types/index_head/seq/0")
            self.tensor_records = self._io.read_u4le()
            if not self.tensor_records <= 1048576:
                raise kaitaistruct.ValidationGreaterThanError(1048576, self.tensor_records, self._io, u"/types/index_head/seq/1")
            self.file_records = self._io.read_u4le()
            if not self.file_records <= 64:
                raise kaitaistruct.ValidationGreaterThanError(64, self.file_records, self._io, u"/types/index_head/seq/2")
            self.digest_bytes = self._io.read_u4le()
            if not  ((self.digest_bytes == 8) or (self.digest_bytes == 32)) :
                raise kaitaistruct.ValidationNotAnyOfError(self.digest_bytes, self._io, u"/types/index_head/seq/3")
            self.chunk_records = self._io.read_u8le()
            if not self.chunk_records <= self._root.footer.index_raw_bytes // 56:
                raise kaitaistruct.ValidationGreaterThanError(self._root.footer.index_raw_bytes // 56, self.chunk_records, self._io, u"/types/index_head/seq/4")
            self.heap_bytes = self._io.read_u8le()
            if not self.heap_bytes <= self._root.footer.index_raw_bytes:
                raise kaitaistruct.ValidationGreaterThanError(self._root.footer.index_raw_bytes, self.heap_bytes, self._io, u"/types/index_head/seq/5")
            self.metadata_bytes = self._io.read_u8le()
            if not self.metadata_bytes <= 1048576:
                raise kaitaistruct.ValidationGreaterThanError(1048576, self.metadata_bytes, self._io, u"/types/index_head/seq/6")
            self.check_sizes = self._io.read_bytes(0)
            _ = self.check_sizes
            if not (((((128 + 104 * self.base_records) + 128 * self.tensor_records) + 128 * self.file_records) + 56 * self.chunk_records) + self.heap_bytes) + self.metadata_bytes == self._root.footer.index_raw_bytes:
                raise kaitaistruct.ValidationExprError(self.check_sizes, self._io, u"/types/index_head/seq/7")
            self.base_root = self._io.read_bytes(32)
            self.content_digest = self._io.read_bytes(32)
            self.reserved = self._io.read_bytes(24)
            if not self.reserved == b"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00":
                raise kaitaistruct.ValidationNotEqualError(b"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", self.reserved, self._io, u"/types/index_head/seq/10")


        def _fetch_instances(self):
            pass


    class LevelsParameters(KaitaiStruct):
        """A change is a multiple of 2^(exponent / 2).

        .. seealso::
           format_spec/SPEC.md, section 6: Value codecs
        """
        def __init__(self, _io, _parent=None, _root=None):
            super(Nps.LevelsParameters, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self._read()

        def _read(self):
            self.exponent = self._io.read_s2le()
            if not self.exponent >= -120:
                raise kaitaistruct.ValidationLessThanError(-120, self.exponent, self._io, u"/types/levels_parameters/seq/0")
            if not self.exponent <= 120:
                raise kaitaistruct.ValidationGreaterThanError(120, self.exponent, self._io, u"/types/levels_parameters/seq/0")


        def _fetch_instances(self):
            pass


    class Name(KaitaiStruct):
        """A tensor's name: 1 to 512 bytes of UTF-8 without control characters. `octets` are read for the
        sake of their check, `bytes` to compare names by their bytes in languages that do not compare
        strings by code points.

        .. seealso::
           format_spec/SPEC.md, section 3.6: Heap and metadata
        """
        def __init__(self, _io, _parent=None, _root=None):
            super(Nps.Name, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self._read()

        def _read(self):
            self.octets = []
            i = 0
            while not self._io.is_eof():
                self.octets.append(self._io.read_u1())
                _ = self.octets[i]
                if not  ((_ >= 32) and (_ != 127) and ( ((i == 0) or (self.octets[i - 1] != 194) or (_ >= 160)) )) :
                    raise kaitaistruct.ValidationExprError(self.octets[i], self._io, u"/types/name/seq/0")
                i += 1

            self.check_text = self._io.read_bytes(0)
            _ = self.check_text
            if not self.text != u"__metadata__":
                raise kaitaistruct.ValidationExprError(self.check_text, self._io, u"/types/name/seq/1")


        def _fetch_instances(self):
            pass
            for i in range(len(self.octets)):
                pass

            _ = self.bytes
            if hasattr(self, '_m_bytes'):
                pass

            _ = self.text
            if hasattr(self, '_m_text'):
                pass


        @property
        def bytes(self):
            if hasattr(self, '_m_bytes'):
                return self._m_bytes

            _pos = self._io.pos()
            self._io.seek(0)
            self._m_bytes = self._io.read_bytes_full()
            self._io.seek(_pos)
            return getattr(self, '_m_bytes', None)

        @property
        def text(self):
            if hasattr(self, '_m_text'):
                return self._m_text

            _pos = self._io.pos()
            self._io.seek(0)
            self._m_text = (self._io.read_bytes_full()).decode(u"UTF-8")
            self._io.seek(_pos)
            return getattr(self, '_m_text', None)


    class Shape(KaitaiStruct):
        """8 dimensions; those from rank on are 0.

        .. seealso::
           format_spec/SPEC.md, section 3.2: Base record
        """
        def __init__(self, rank, _io, _parent=None, _root=None):
            super(Nps.Shape, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self.rank = rank
            self._read()

        def _read(self):
            self.dims = []
            for i in range(8):
                self.dims.append(Nps.Dim(i < self.rank, (1 if i == 0 else self.dims[i - 1].end_nonzero), (1 if i == 0 else self.dims[i - 1].end_elements), (1 if i < 2 else self.dims[i - 1].end_columns), self._io, self, self._root))



        def _fetch_instances(self):
            pass
            for i in range(len(self.dims)):
                pass
                self.dims[i]._fetch_instances()

            _ = self.bytes
            if hasattr(self, '_m_bytes'):
                pass


        @property
        def bytes(self):
            if hasattr(self, '_m_bytes'):
                return self._m_bytes

            _pos = self._io.pos()
            self._io.seek(0)
            self._m_bytes = self._io.read_bytes(64)
            self._io.seek(_pos)
            return getattr(self, '_m_bytes', None)

        @property
        def elements(self):
            """Number of elements, 1 for rank 0."""
            if hasattr(self, '_m_elements'):
                return self._m_elements

            self._m_elements = self.dims[-1].end_elements
            return getattr(self, '_m_elements', None)


    class Share(KaitaiStruct):
        """How often a token occurs, of 4096 times.

        .. seealso::
           format_spec/SPEC.md, section 6: Value codecs
        """
        def __init__(self, token, start, _io, _parent=None, _root=None):
            super(Nps.Share, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self.token = token
            self.start = start
            self._read()

        def _read(self):
            self.share = self._io.read_u2le()
            _ = self.share
            if not  ((self.token != 1) or (_ == 0)) :
                raise kaitaistruct.ValidationExprError(self.share, self._io, u"/types/share/seq/0")


        def _fetch_instances(self):
            pass

        @property
        def end(self):
            if hasattr(self, '_m_end'):
                return self._m_end

            self._m_end = self.start + self.share
            return getattr(self, '_m_end', None)


    class SignsParameters(KaitaiStruct):
        """Which elements are drawn, and how large their changes are.

        .. seealso::
           format_spec/SPEC.md, section 6: Value codecs
        """
        def __init__(self, record, _io, _parent=None, _root=None):
            super(Nps.SignsParameters, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self.record = record
            self._read()

        def _read(self):
            self.seed = self._io.read_u8le()
            self.gain = self._io.read_f4le()
            _ = self.gain
            if not _ <= 3.4028234663852886E+38:
                raise kaitaistruct.ValidationExprError(self.gain, self._io, u"/types/signs_parameters/seq/1")
            self.check_gain = self._io.read_bytes(0)
            _ = self.check_gain
            if not self.gain_bits < 2147483648:
                raise kaitaistruct.ValidationExprError(self.check_gain, self._io, u"/types/signs_parameters/seq/2")
            self.num_subspaces = self._io.read_u2le()
            if not self.num_subspaces == ((self.record.mask_raw_bytes - 16) - self.record.exponents) // 16:
                raise kaitaistruct.ValidationNotEqualError(((self.record.mask_raw_bytes - 16) - self.record.exponents) // 16, self.num_subspaces, self._io, u"/types/signs_parameters/seq/3")
            self.reserved = self._io.read_bytes(2)
            if not self.reserved == b"\x00\x00":
                raise kaitaistruct.ValidationNotEqualError(b"\x00\x00", self.reserved, self._io, u"/types/signs_parameters/seq/4")
            self.subspaces = []
            for i in range(self.num_subspaces):
                self.subspaces.append(Nps.Subspace(i, (-32768 if i == 0 else self.subspaces[i - 1].first), self._io, self, self._root))

            self.exponents = Nps.Exponents(self.record, self._io, self, self._root)


        def _fetch_instances(self):
            pass
            for i in range(len(self.subspaces)):
                pass
                self.subspaces[i]._fetch_instances()

            self.exponents._fetch_instances()
            _ = self.gain_bits
            if hasattr(self, '_m_gain_bits'):
                pass


        @property
        def gain_bits(self):
            if hasattr(self, '_m_gain_bits'):
                return self._m_gain_bits

            _pos = self._io.pos()
            self._io.seek(8)
            self._m_gain_bits = self._io.read_u4le()
            self._io.seek(_pos)
            return getattr(self, '_m_gain_bits', None)


    class Subspace(KaitaiStruct):
        """Elements whose exponents add up to `first` or more, but less than the next one's.

        .. seealso::
           format_spec/SPEC.md, section 6: Value codecs
        """
        def __init__(self, number, previous, _io, _parent=None, _root=None):
            super(Nps.Subspace, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self.number = number
            self.previous = previous
            self._read()

        def _read(self):
            self.first = self._io.read_s2le()
            _ = self.first
            if not (_ == -32768 if self.number == 0 else _ > self.previous):
                raise kaitaistruct.ValidationExprError(self.first, self._io, u"/types/subspace/seq/0")
            self.reserved = self._io.read_bytes(2)
            if not self.reserved == b"\x00\x00":
                raise kaitaistruct.ValidationNotEqualError(b"\x00\x00", self.reserved, self._io, u"/types/subspace/seq/1")
            self.scale = self._io.read_f4le()
            _ = self.scale
            if not  ((_ > 0) and (_ <= 3.4028234663852886E+38)) :
                raise kaitaistruct.ValidationExprError(self.scale, self._io, u"/types/subspace/seq/2")
            self.rate = self._io.read_f8le()
            _ = self.rate
            if not  ((_ > 0) and (_ <= 1.7976931348623157E+308)) :
                raise kaitaistruct.ValidationExprError(self.rate, self._io, u"/types/subspace/seq/3")


        def _fetch_instances(self):
            pass


    class TensorRecord(KaitaiStruct):
        """One tensor of the fine-tune, or one small file beside the weights.

        .. seealso::
           format_spec/SPEC.md, sections 3.3: Tensor record, and 3.4: File record
        """
        def __init__(self, is_file, first_chunk, _io, _parent=None, _root=None):
            super(Nps.TensorRecord, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self.is_file = is_file
            self.first_chunk = first_chunk
            self._read()

        def _read(self):
            self.name_bytes = self._io.read_u2le()
            if not self.name_bytes >= 1:
                raise kaitaistruct.ValidationLessThanError(1, self.name_bytes, self._io, u"/types/tensor_record/seq/0")
            if not self.name_bytes <= (128 if self.is_file else 512):
                raise kaitaistruct.ValidationGreaterThanError((128 if self.is_file else 512), self.name_bytes, self._io, u"/types/tensor_record/seq/0")
            self.dtype = KaitaiStream.resolve_enum(Nps.Dtype, self._io.read_u1())
            _ = self.dtype
            if not (_ == Nps.Dtype.u8 if self.is_file else  ((int(_) >= int(Nps.Dtype.bool)) and (int(_) <= int(Nps.Dtype.c64))) ):
                raise kaitaistruct.ValidationExprError(self.dtype, self._io, u"/types/tensor_record/seq/1")
            self.rank = self._io.read_u1()
            if not self.rank >= (1 if self.is_file else 0):
                raise kaitaistruct.ValidationLessThanError((1 if self.is_file else 0), self.rank, self._io, u"/types/tensor_record/seq/2")
            if not self.rank <= (1 if self.is_file else 8):
                raise kaitaistruct.ValidationGreaterThanError((1 if self.is_file else 8), self.rank, self._io, u"/types/tensor_record/seq/2")
            self.op = KaitaiStream.resolve_enum(Nps.Op, self._io.read_u1())
            _ = self.op
            if not  ((_ == Nps.Op.copy) or (_ == Nps.Op.new) or ( ((_ == Nps.Op.delta) and ((not (self.is_file)))) )) :
                raise kaitaistruct.ValidationExprError(self.op, self._io, u"/types/tensor_record/seq/3")
            self.value_codec = KaitaiStream.resolve_enum(Nps.ValueCodec, self._io.read_u1())
            _ = self.value_codec
            if not (_ == Nps.ValueCodec.none if self.op == Nps.Op.copy else (_ == Nps.ValueCodec.replace if self.op == Nps.Op.new else  ((_ == Nps.ValueCodec.replace) or (_ == Nps.ValueCodec.xor) or ( ((_ == Nps.ValueCodec.ulp) and ( ((self.dtype == Nps.Dtype.f16) or (self.dtype == Nps.Dtype.bf16) or (self.dtype == Nps.Dtype.f32) or (self.dtype == Nps.Dtype.f64)) )) ) or ( (( ((_ == Nps.ValueCodec.coded_ulp) or (_ == Nps.ValueCodec.signs) or (_ == Nps.ValueCodec.levels) or (_ == Nps.ValueCodec.grid)) ) and ( ((self.dtype == Nps.Dtype.f16) or (self.dtype == Nps.Dtype.bf16) or (self.dtype == Nps.Dtype.f32)) )) )) )):
                raise kaitaistruct.ValidationExprError(self.value_codec, self._io, u"/types/tensor_record/seq/4")
            self.chunk_log2 = self._io.read_u1()
            _ = self.chunk_log2
            if not (_ == 0 if self.op == Nps.Op.copy else  ((_ >= 10) and (_ <= 24)) ):
                raise kaitaistruct.ValidationExprError(self.chunk_log2, self._io, u"/types/tensor_record/seq/5")
            self.reserved0 = self._io.read_bytes(1)
            if not self.reserved0 == b"\x00":
                raise kaitaistruct.ValidationNotEqualError(b"\x00", self.reserved0, self._io, u"/types/tensor_record/seq/6")
            self.base_index = self._io.read_u4le()
            _ = self.base_index
            if not (_ == 4294967295 if  ((self.is_file) or (self.op == Nps.Op.new))  else _ < self._parent.head.base_records):
                raise kaitaistruct.ValidationExprError(self.base_index, self._io, u"/types/tensor_record/seq/7")
            self.reserved1 = self._io.read_bytes(4)
            if not self.reserved1 == b"\x00\x00\x00\x00":
                raise kaitaistruct.ValidationNotEqualError(b"\x00\x00\x00\x00", self.reserved1, self._io, u"/types/tensor_record/seq/8")
            self._raw_shape = self._io.read_bytes(64)
            _io__raw_shape = KaitaiStream(BytesIO(self._raw_shape))
            self.shape = Nps.Shape(self.rank, _io__raw_shape, self, self._root)
            _ = self.shape
            if not  (((not (self.is_file))) or (_.elements <= 67108864)) :
                raise kaitaistruct.ValidationExprError(self.shape, self._io, u"/types/tensor_record/seq/9")
            if  (((not (self.is_file))) and (self.op != Nps.Op.new)) :
                pass
                self.check_shape = self._io.read_bytes(0)
                _ = self.check_shape
                if not  ((self.dtype == self.base.dtype) and (self.rank == self.base.rank) and (self.shape.bytes == self.base.shape.bytes)) :
                    raise kaitaistruct.ValidationExprError(self.check_shape, self._io, u"/types/tensor_record/seq/10")

            self.digest = self._io.read_bytes(self._parent.head.digest_bytes)
            _ = self.digest
            if not  ((self.is_file) or (self.op != Nps.Op.copy) or (_ == b"\x00\x00\x00\x00\x00\x00\x00\x00") or (_ == b"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")) :
                raise kaitaistruct.ValidationExprError(self.digest, self._io, u"/types/tensor_record/seq/11")
            if self._parent.head.digest_bytes == 8:
                pass
                self.digest_rest = self._io.read_bytes(24)
                if not self.digest_rest == b"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00":
                    raise kaitaistruct.ValidationNotEqualError(b"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", self.digest_rest, self._io, u"/types/tensor_record/seq/12")

            self.reserved2 = self._io.read_bytes(16)
            if not self.reserved2 == b"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00":
                raise kaitaistruct.ValidationNotEqualError(b"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", self.reserved2, self._io, u"/types/tensor_record/seq/13")


        def _fetch_instances(self):
            pass
            self.shape._fetch_instances()
            if  (((not (self.is_file))) and (self.op != Nps.Op.new)) :
                pass

            if self._parent.head.digest_bytes == 8:
                pass


        @property
        def base(self):
            """The base tensor of a copy or delta."""
            if hasattr(self, '_m_base'):
                return self._m_base

            if  (((not (self.is_file))) and (self.op != Nps.Op.new)) :
                pass
                self._m_base = self._parent.base_records[self.base_index]

            return getattr(self, '_m_base', None)

        @property
        def chunk_elements(self):
            """Elements of every chunk but the last one."""
            if hasattr(self, '_m_chunk_elements'):
                return self._m_chunk_elements

            self._m_chunk_elements = 1 << self.chunk_log2
            return getattr(self, '_m_chunk_elements', None)

        @property
        def chunks(self):
            """Number of chunks."""
            if hasattr(self, '_m_chunks'):
                return self._m_chunks

            self._m_chunks = (0 if self.op == Nps.Op.copy else self.parameter_chunks + ((self.shape.elements + self.chunk_elements) - 1) // self.chunk_elements)
            return getattr(self, '_m_chunks', None)

        @property
        def columns(self):
            if hasattr(self, '_m_columns'):
                return self._m_columns

            self._m_columns = (self.shape.elements if self.rank < 2 else self.shape.dims[-1].end_columns)
            return getattr(self, '_m_columns', None)

        @property
        def end_chunk(self):
            if hasattr(self, '_m_end_chunk'):
                return self._m_end_chunk

            self._m_end_chunk = self.first_chunk + self.chunks
            return getattr(self, '_m_end_chunk', None)

        @property
        def has_bits(self):
            """Plane 0 holds a bit, which is a sign, for every kept element."""
            if hasattr(self, '_m_has_bits'):
                return self._m_has_bits

            self._m_has_bits =  ((self.is_signs) or (self.is_grid))
            return getattr(self, '_m_has_bits', None)

        @property
        def has_parameters(self):
            """The first chunk holds parameters, no elements."""
            if hasattr(self, '_m_has_parameters'):
                return self._m_has_parameters

            self._m_has_parameters =  ((self.has_bits) or (self.value_codec == Nps.ValueCodec.levels))
            return getattr(self, '_m_has_parameters', None)

        @property
        def is_coded_ulp(self):
            """Plane 0 holds tokens of distances, plane 1 their low bits."""
            if hasattr(self, '_m_is_coded_ulp'):
                return self._m_is_coded_ulp

            self._m_is_coded_ulp = self.value_codec == Nps.ValueCodec.coded_ulp
            return getattr(self, '_m_is_coded_ulp', None)

        @property
        def is_grid(self):
            if hasattr(self, '_m_is_grid'):
                return self._m_is_grid

            self._m_is_grid = self.value_codec == Nps.ValueCodec.grid
            return getattr(self, '_m_is_grid', None)

        @property
        def is_signs(self):
            if hasattr(self, '_m_is_signs'):
                return self._m_is_signs

            self._m_is_signs = self.value_codec == Nps.ValueCodec.signs
            return getattr(self, '_m_is_signs', None)

        @property
        def parameter_chunks(self):
            if hasattr(self, '_m_parameter_chunks'):
                return self._m_parameter_chunks

            self._m_parameter_chunks = (1 if self.has_parameters else 0)
            return getattr(self, '_m_parameter_chunks', None)

        @property
        def rows(self):
            """The tensor as a matrix, for its parameters."""
            if hasattr(self, '_m_rows'):
                return self._m_rows

            self._m_rows = (1 if self.rank < 2 else self.shape.dims[0].size)
            return getattr(self, '_m_rows', None)

        @property
        def width(self):
            """Bytes of an element, and planes of a chunk.

            .. seealso::
               format_spec/SPEC.md, section 4: Dtypes
            """
            if hasattr(self, '_m_width'):
                return self._m_width

            self._m_width = KaitaiStream.byte_array_index(b"\x00\x01\x01\x01\x02\x02\x04\x04\x08\x08\x01\x01\x01\x02\x02\x04\x08\x08", int(self.dtype))
            return getattr(self, '_m_width', None)


    class Tokens(KaitaiStruct):
        """How often each token occurs, by the exponent of the base's word; then words of 16 bits, the
        first eight of which are the four states.

        .. seealso::
           format_spec/SPEC.md, section 6: Value codecs
        """
        def __init__(self, record, _io, _parent=None, _root=None):
            super(Nps.Tokens, self).__init__(_io)
            self._parent = _parent
            self._root = _root
            self.record = record
            self._read()

        def _read(self):
            self.num_contexts = self._io.read_u1()
            if not self.num_contexts >= 1:
                raise kaitaistruct.ValidationLessThanError(1, self.num_contexts, self._io, u"/types/tokens/seq/0")
            if not self.num_contexts <= 64:
                raise kaitaistruct.ValidationGreaterThanError(64, self.num_contexts, self._io, u"/types/tokens/seq/0")
            self.contexts = []
            for i in range(self.num_contexts):
                self.contexts.append(Nps.Context(i, (0 if i == 0 else self.contexts[i - 1].first_exponent), 16 * self.record.tensor.width, self._io, self, self._root))

            self.states = []
            for i in range(4):
                self.states.append(self._io.read_u4le())

            self.words = []
            i = 0
            while not self._io.is_eof():
                self.words.append(self._io.read_u2le())
                i += 1



        def _fetch_instances(self):
            pass
            for i in range(len(self.contexts)):
                pass
                self.contexts[i]._fetch_instances()

            for i in range(len(self.states)):
                pass

            for i in range(len(self.words)):
                pass



    @property
    def footer(self):
        if hasattr(self, '_m_footer'):
            return self._m_footer

        _pos = self._io.pos()
        self._io.seek(self._io.size() - 96)
        self._m_footer = Nps.Footer(self._io, self, self._root)
        self._io.seek(_pos)
        return getattr(self, '_m_footer', None)

    @property
    def index(self):
        """
        .. seealso::
           format_spec/SPEC.md, section 3: Index
        """
        if hasattr(self, '_m_index'):
            return self._m_index

        self._m_index = (self.index_raw if self.footer.index_compression == Nps.IndexCompression.raw else self.index_zstd)
        return getattr(self, '_m_index', None)

    @property
    def index_raw(self):
        """The index where it is stored raw; use `index`."""
        if hasattr(self, '_m_index_raw'):
            return self._m_index_raw

        if self.footer.index_compression == Nps.IndexCompression.raw:
            pass
            _pos = self._io.pos()
            self._io.seek(self.footer.index_offset)
            self._raw__m_index_raw = self._io.read_bytes(self.footer.index_stored_bytes)
            _io__raw__m_index_raw = KaitaiStream(BytesIO(self._raw__m_index_raw))
            self._m_index_raw = Nps.Index(_io__raw__m_index_raw, self, self._root)
            self._io.seek(_pos)

        return getattr(self, '_m_index_raw', None)

    @property
    def index_zstd(self):
        """The index where it is stored as one zstd frame; use `index`. `nps_zstd(n)` is a routine that
        has to be written by hand: it refuses what is not exactly one frame that states the content
        size n, or has a dictionary id, a checksum or a window of more than 8 MiB. `nps_zstd(n, m, d)`
        needs, unless m is 0, a raw-content dictionary of m bytes whose SHA-256 begins with d: the
        decompressed index of the file `base.nps` in the same folder.

        .. seealso::
           format_spec/SPEC.md, sections 2.4: Dictionaries and bundles, and 7: zstd frames
        """
        if hasattr(self, '_m_index_zstd'):
            return self._m_index_zstd

        if self.footer.index_compression != Nps.IndexCompression.raw:
            pass
            _pos = self._io.pos()
            self._io.seek(self.footer.index_offset)
            self._raw__raw__m_index_zstd = self._io.read_bytes(self.footer.index_stored_bytes)
            _process = NpsZstd(self.footer.index_raw_bytes, self.footer.dictionary_bytes, self.footer.dictionary_digest64)
            self._raw__m_index_zstd = _process.decode(self._raw__raw__m_index_zstd)
            _io__raw__m_index_zstd = KaitaiStream(BytesIO(self._raw__m_index_zstd))
            self._m_index_zstd = Nps.Index(_io__raw__m_index_zstd, self, self._root)
            self._io.seek(_pos)

        return getattr(self, '_m_index_zstd', None)
