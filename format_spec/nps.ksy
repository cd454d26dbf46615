# What a parser generated from this file checks is marked with the rule of section 8 of
# format_spec/SPEC.md. What it cannot check: CRC-32s and digests (H-CRC, T-CRC, I-DIGEST, I-ROOT,
# P-DIGEST, D-DIGEST, D-CONTENT), all of a dictionary but what it is used for (T-DICTIONARY), the
# JSON of the metadata (M-JSON, M-KEYS), and the chunks' streams, which stay as they are stored
# (P-ZSTD, P-GAP, P-CODE, P-POPCOUNT, P-TAIL, P-ESCAPE); parameters and the contexts of distances
# alone are read. A generated parser stops at a broken rule, not necessarily at the first one in the
# order of section 8.
#
# Fields of `size: 0` are checks: they read nothing. `seq` of `nps` reads everything, so that a
# parser that has returned has checked everything.
meta:
  id: nps
  title: A fine-tuned model as changes against a base model, version 1.0
  file-extension: nps
  license: Apache-2.0
  ks-version: '0.11'
  endian: le
  encoding: UTF-8

doc: |
  A `.nps` file holds a fine-tuned model as changes against a base model that it does not contain:
  header, chunk data, index, footer. The footer says where the index is, the index what the chunk
  data are. All integers are unsigned and little-endian.
doc-ref: 'format_spec/SPEC.md, section 2: File'

seq:
  - id: header
    type: header
  - id: chunk_data
    type: chunk_data
    size: footer.index_offset - 64
    doc: The chunks of all tensors, then of all files, in the order of their records.
    doc-ref: 'format_spec/SPEC.md, section 2.2: Chunk data'

instances:
  footer:
    pos: _io.size - 96  # F-SIZE: a negative position where the file is too short
    type: footer
  index_raw:
    pos: footer.index_offset
    size: footer.index_stored_bytes
    type: index
    if: footer.index_compression == index_compression::raw
    doc: The index where it is stored raw; use `index`.
  index_zstd:
    pos: footer.index_offset
    size: footer.index_stored_bytes
    process: nps_zstd(footer.index_raw_bytes, footer.dictionary_bytes, footer.dictionary_digest64)
    # I-ZSTD
    type: index
    if: footer.index_compression != index_compression::raw
    doc: |
      The index where it is stored as one zstd frame; use `index`. `nps_zstd(n)` is a routine that
      has to be written by hand: it refuses what is not exactly one frame that states the content
      size n, or has a dictionary id, a checksum or a window of more than 8 MiB. `nps_zstd(n, m, d)`
      needs, unless m is 0, a raw-content dictionary of m bytes whose SHA-256 begins with d: the
      decompressed index of the file `base.nps` in the same folder.
    doc-ref: 'format_spec/SPEC.md, sections 2.4: Dictionaries and bundles, and 7: zstd frames'
  index:
    value: 'footer.index_compression == index_compression::raw ? index_raw : index_zstd'
    doc-ref: 'format_spec/SPEC.md, section 3: Index'

types:
  header:
    doc-ref: 'format_spec/SPEC.md, section 2.1: Header'
    seq:
      - id: magic
        contents: [0x89, NPS, 0x0d, 0x0a, 0x1a, 0x0a]  # H-MAGIC
      - id: major
        type: u2
        valid: 1  # H-MAJOR
      - id: minor
        type: u2
        doc: 0 in this version; a reader accepts any.
      - id: reserved0
        contents: [0, 0, 0, 0]  # H-RESERVED
      - id: required_features
        type: u8
        valid: 0  # H-FEATURE
        doc: Bits that a reader must know; none is defined.
      - id: optional_features
        type: u8
        doc: Bits that a reader may ignore; none is defined.
      - id: reserved1
        contents: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                   0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]  # H-RESERVED
      - id: crc32
        type: u4
        doc: CRC-32 (zlib's) of bytes 0 to 59. Not checked here.

  footer:
    doc-ref: 'format_spec/SPEC.md, section 2.3: Footer'
    seq:
      - id: index_offset
        type: u8
        valid:
          expr: _ >= 64 and _ % 8 == 0 and _ <= _root._io.size - 96  # T-INDEX
        doc: Where the chunk data end.
      - id: index_stored_bytes
        type: u8
        valid: _root._io.size - 96 - index_offset  # T-INDEX
      - id: index_raw_bytes
        type: u8
        valid:  # T-INDEXSIZE
          min: 128
          max: 1073741824
      - id: file_bytes
        type: u8
        valid: _root._io.size  # T-SIZE
      - id: index_digest
        size: 32
        doc: BLAKE3 of the stored index. Not checked here.
      - id: major
        type: u2
        valid: _root.header.major  # T-VERSION
      - id: minor
        type: u2
        valid: _root.header.minor  # T-VERSION
      - id: index_compression
        type: u1
        enum: index_compression
        valid:
          in-enum: true  # T-COMPRESSION
      - id: reserved
        contents: [0, 0, 0]  # T-RESERVED
      - id: dictionary_bytes
        type: u4
        valid:
          expr: _ == 0 or index_compression == index_compression::zstd_dictionary  # T-RESERVED
        doc: Size of the dictionary of the index.
      - id: dictionary_digest64
        size: 8
        valid:
          expr: |
            _ == [0, 0, 0, 0, 0, 0, 0, 0] or index_compression == index_compression::zstd_dictionary
          # T-RESERVED
        doc: The first 8 bytes of its digest.
      - id: check_index_raw_bytes
        size: 0
        valid:
          expr: |
            index_compression == index_compression::raw
            ? index_raw_bytes == index_stored_bytes
            : index_stored_bytes < index_raw_bytes
              and index_raw_bytes <= 8 * index_stored_bytes + 1048576 + dictionary_bytes
          # T-INDEXSIZE
      - id: crc32
        type: u4
        doc: CRC-32 of footer bytes 0 to 83. Not checked here.
      - id: magic_reversed
        contents: [0x0a, 0x1a, 0x0a, 0x0d, SPN, 0x89]  # T-MAGIC

  index:
    doc: Head, then five tables and two texts, end to end, nothing else.
    doc-ref: 'format_spec/SPEC.md, section 3: Index'
    seq:
      - id: head
        type: index_head
      - id: base_records
        type: base_record
        repeat: expr
        repeat-expr: head.base_records
        doc: Every tensor of the base, used or not.
      - id: tensor_records
        type: 'tensor_record(false, _index == 0 ? 0 : tensor_records[_index - 1].end_chunk)'
        repeat: expr
        repeat-expr: head.tensor_records
        doc: Every tensor of the fine-tune.
      - id: file_records
        type: 'tensor_record(true,
          _index == 0 ? end_tensor_chunk : file_records[_index - 1].end_chunk)'
        repeat: expr
        repeat-expr: head.file_records
        doc: The small files beside the weights.
        doc-ref: 'format_spec/SPEC.md, section 3.4: File record'
      - id: check_chunk_records
        size: 0
        valid:
          expr: head.chunk_records == end_chunk  # C-COUNT
      - id: tensor_chunks
        type: 'chunk_records(tensor_records[_index],
          _index == 0 ? 0 : tensor_chunks[_index - 1].end_raw_bytes)'
        repeat: expr
        repeat-expr: head.tensor_records
        doc: The chunk records of tensor `_index`. One flat table in the file.
      - id: file_chunks
        type: 'chunk_records(file_records[_index],
          _index == 0 ? end_tensor_raw_bytes : file_chunks[_index - 1].end_raw_bytes)'
        repeat: expr
        repeat-expr: head.file_records
        doc: The chunk records of file `_index`, which follow those of the tensors.
      - id: heap
        type: heap
        size: head.heap_bytes
      - id: metadata
        type: str
        size: head.metadata_bytes
        valid:
          expr: _.length >= 2 and _.substring(0, 1) == "{"  # M-JSON, but only a bit of it
        doc: |
          One JSON object in UTF-8 whose values are strings, without white space before it, without
          repeated keys or unpaired surrogates. Nothing in it changes how a file is decoded.
        doc-ref: 'format_spec/SPEC.md, section 3.6: Heap and metadata'
    instances:
      end_tensor_chunk:
        value: 'tensor_records.size == 0 ? 0 : tensor_records.last.end_chunk'
        doc: Number of chunks of all tensors.
      end_chunk:
        value: 'file_records.size == 0 ? end_tensor_chunk : file_records.last.end_chunk'
        doc: Number of chunks that the shapes of all tensors and files ask for.
      end_tensor_raw_bytes:
        value: 'tensor_chunks.size == 0 ? 0 : tensor_chunks.last.end_raw_bytes'
        doc: Sum of the raw sizes of all masks and planes of all tensors, and work.

  index_head:
    doc-ref: 'format_spec/SPEC.md, section 3.1: Head'
    seq:
      - id: base_records
        type: u4
        valid:
          max: 1048576  # I-COUNT
      - id: tensor_records
        type: u4
        valid:
          max: 1048576  # I-COUNT
      - id: file_records
        type: u4
        valid:
          max: 64  # I-COUNT
      - id: digest_bytes
        type: u4
        valid:
          any-of: [8, 32]  # I-DIGESTS
        doc: How many bytes of a digest each record holds; the rest of its field is zero.
      - id: chunk_records
        type: u8
        valid:
          max: _root.footer.index_raw_bytes / 56  # I-SIZE; so the sum below does not overflow
      - id: heap_bytes
        type: u8
        valid:
          max: _root.footer.index_raw_bytes  # I-SIZE
      - id: metadata_bytes
        type: u8
        valid:
          max: 1048576  # M-SIZE
      - id: check_sizes
        size: 0
        valid:
          expr: |
            128 + 104 * base_records + 128 * tensor_records + 128 * file_records
            + 56 * chunk_records + heap_bytes + metadata_bytes == _root.footer.index_raw_bytes
          # I-SIZE
      - id: base_root
        size: 32
        doc: Digest over all tensors of the base. Not checked here (I-ROOT).
        doc-ref: 'format_spec/SPEC.md, section 3.7: Base root'
      - id: content_digest
        size: 32
        doc: Digest over all tensors and files. Not checked here (I-ROOT, D-CONTENT).
        doc-ref: 'format_spec/SPEC.md, section 3.8: Content digest'
      - id: reserved
        contents: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                   0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]  # I-RESERVED

  base_record:
    doc: One tensor of the base.
    doc-ref: 'format_spec/SPEC.md, section 3.2: Base record'
    seq:
      - id: name_bytes
        type: u2
        valid:  # N-LENGTH
          min: 1
          max: 512
        doc: Size of the name, which lies in the heap.
      - id: dtype
        type: u1
        enum: dtype
        valid:
          in-enum: true  # S-DTYPE
      - id: rank
        type: u1
        valid:
          max: 8  # S-RANK
      - id: reserved
        contents: [0, 0, 0, 0]  # I-RESERVED
      - id: shape
        type: shape(rank)
        size: 64
      - id: digest
        size: _parent.head.digest_bytes
        doc: BLAKE3 of the tensor's elements as little-endian bytes in row-major order.
      - id: digest_rest
        contents: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                   0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]  # I-DIGESTS
        if: _parent.head.digest_bytes == 8

  tensor_record:
    doc: One tensor of the fine-tune, or one small file beside the weights.
    doc-ref: 'format_spec/SPEC.md, sections 3.3: Tensor record, and 3.4: File record'
    params:
      - id: is_file
        type: bool
      - id: first_chunk
        type: u8
        doc: Number of chunks of all tensors and files before this one.
    seq:
      - id: name_bytes
        type: u2
        valid:  # N-LENGTH; N-FILE
          min: 1
          max: 'is_file ? 128 : 512'
        doc: Size of the name, which lies in the heap.
      - id: dtype
        type: u1
        enum: dtype
        valid:
          expr: |
            is_file ? _ == dtype::u8 : _.to_i >= dtype::bool.to_i and _.to_i <= dtype::c64.to_i
          # S-DTYPE; R-FILE
      - id: rank
        type: u1
        valid:  # S-RANK; R-FILE
          min: 'is_file ? 1 : 0'
          max: 'is_file ? 1 : 8'
      - id: op
        type: u1
        enum: op
        valid:
          expr: _ == op::copy or _ == op::new or (_ == op::delta and not is_file)  # R-OP; R-FILE
      - id: value_codec
        type: u1
        enum: value_codec
        valid:
          expr: |
            op == op::copy ? _ == value_codec::none
            : op == op::new ? _ == value_codec::replace
            : _ == value_codec::replace or _ == value_codec::xor
              or (_ == value_codec::ulp and (dtype == dtype::f16 or dtype == dtype::bf16
                                             or dtype == dtype::f32 or dtype == dtype::f64))
              or ((_ == value_codec::coded_ulp or _ == value_codec::signs
                   or _ == value_codec::levels or _ == value_codec::grid)
                  and (dtype == dtype::f16 or dtype == dtype::bf16 or dtype == dtype::f32))
          # R-VALUES
      - id: chunk_log2
        type: u1
        valid:
          expr: 'op == op::copy ? _ == 0 : _ >= 10 and _ <= 24'  # R-CHUNKLOG
        doc: c of the chunk size of 2^c elements; 0 for a copy.
      - id: reserved0
        contents: [0]  # R-RESERVED
      - id: base_index
        type: u4
        valid:
          expr: |
            is_file or op == op::new ? _ == 0xffffffff : _ < _parent.head.base_records
          # R-BASE
        doc: Number of the base record; FFFFFFFF for a new tensor and for a file.
      - id: reserved1
        contents: [0, 0, 0, 0]  # R-RESERVED
      - id: shape
        type: shape(rank)
        size: 64
        valid:
          expr: not is_file or _.elements <= 67108864  # R-FILE
      - id: check_shape
        size: 0
        if: not is_file and op != op::new
        valid:
          expr: dtype == base.dtype and rank == base.rank and shape.bytes == base.shape.bytes
          # R-SHAPE
      - id: digest
        size: _parent.head.digest_bytes
        valid:
          expr: |
            is_file or op != op::copy
            or _ == [0, 0, 0, 0, 0, 0, 0, 0] or _ == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                               0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
          # R-COPY
        doc: |
          Digest of the rebuilt tensor, zero for a copied one; of the file, copied or new.
      - id: digest_rest
        contents: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                   0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]  # I-DIGESTS
        if: _parent.head.digest_bytes == 8
      - id: reserved2
        contents: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]  # R-RESERVED
        doc: The place of a quantised codec's parameters.
    instances:
      base:
        value: _parent.base_records[base_index]
        if: not is_file and op != op::new
        doc: The base tensor of a copy or delta.
      width:
        value: '[0, 1, 1, 1, 2, 2, 4, 4, 8, 8, 1, 1, 1, 2, 2, 4, 8, 8][dtype.to_i]'
        doc: Bytes of an element, and planes of a chunk.
        doc-ref: 'format_spec/SPEC.md, section 4: Dtypes'
      chunk_elements:
        value: 1 << chunk_log2
        doc: Elements of every chunk but the last one.
      is_signs:
        value: value_codec == value_codec::signs
      is_grid:
        value: value_codec == value_codec::grid
      is_coded_ulp:
        value: value_codec == value_codec::coded_ulp
        doc: Plane 0 holds tokens of distances, plane 1 their low bits.
      has_bits:
        value: is_signs or is_grid
        doc: Plane 0 holds a bit, which is a sign, for every kept element.
      has_parameters:
        value: has_bits or value_codec == value_codec::levels
        doc: The first chunk holds parameters, no elements.
      parameter_chunks:
        value: 'has_parameters ? 1 : 0'
      rows:
        value: 'rank < 2 ? 1 : shape.dims[0].size'
        doc: The tensor as a matrix, for its parameters.
      columns:
        value: 'rank < 2 ? shape.elements : shape.dims.last.end_columns'
      chunks:
        value: |
          op == op::copy ? 0
          : parameter_chunks + (shape.elements + chunk_elements - 1) / chunk_elements
        doc: Number of chunks.
      end_chunk:
        value: first_chunk + chunks

  shape:
    doc: 8 dimensions; those from rank on are 0.
    doc-ref: 'format_spec/SPEC.md, section 3.2: Base record'
    params:
      - id: rank
        type: u1
    seq:
      - id: dims
        type: 'dim(_index < rank,
          _index == 0 ? 1 : dims[_index - 1].end_nonzero,
          _index == 0 ? 1 : dims[_index - 1].end_elements,
          _index < 2 ? 1 : dims[_index - 1].end_columns)'
        repeat: expr
        repeat-expr: 8
    instances:
      bytes:
        pos: 0
        size: 64
      elements:
        value: dims.last.end_elements
        doc: Number of elements, 1 for rank 0.

  dim:
    doc-ref: 'format_spec/SPEC.md, section 3.2: Base record'
    params:
      - id: is_used
        type: bool
        doc: Its number is below the rank.
      - id: nonzero
        type: u8
        doc: Product of the dimensions before, zeros counted as 1.
      - id: elements
        type: u8
        doc: Product of the dimensions before.
      - id: columns
        type: u8
        doc: Product of the dimensions before, but for the first one.
    seq:
      - id: size
        type: u8
        valid:
          expr: _ == 0 or (is_used and _ <= 281474976710656 / nonzero)  # S-DIM; S-NUMEL
    instances:
      end_nonzero:
        value: 'size == 0 ? nonzero : nonzero * size'
      end_elements:
        value: 'is_used ? elements * size : elements'
      end_columns:
        value: 'is_used ? columns * size : columns'

  chunk_records:
    doc: The chunk records of one tensor or file.
    doc-ref: 'format_spec/SPEC.md, section 3.5: Chunk record'
    params:
      - id: tensor
        type: tensor_record
      - id: raw_bytes
        type: u8
        doc: Sum of the raw sizes, and work, of the tensors and files before this one.
    seq:
      - id: chunks
        type: 'chunk_record(tensor, _index,
          _index == 0 ? raw_bytes : chunks[_index - 1].end_raw_bytes)'
        repeat: expr
        repeat-expr: tensor.chunks
    instances:
      end_raw_bytes:
        value: 'chunks.size == 0 ? raw_bytes : chunks.last.end_raw_bytes'

  chunk_record:
    doc: |
      A stream that is not compressed is stored in its raw size; a compressed one in fewer bytes,
      but at least 1/32768 of them.
    doc-ref: 'format_spec/SPEC.md, section 3.5: Chunk record'
    params:
      - id: tensor
        type: tensor_record
      - id: number
        type: u8
        doc: Number of the chunk in its tensor or file.
      - id: raw_bytes
        type: u8
        doc: Sum of the raw sizes of all masks and planes, and work, of the chunks before this one.
    seq:
      - id: mask_stored_bytes
        type: u4
      - id: mask_raw_bytes
        type: u4
      - id: nnz
        type: u4
        valid:
          max: elements  # C-NNZ
        doc: Number of kept elements.
      - id: mask_codec
        type: u1
        enum: mask_codec
        valid:
          expr: |
            is_parameters ? _ == mask_codec::parameters
            : tensor.is_signs ? _ == mask_codec::drawn
            : tensor.is_grid ? _ == (nnz == 0 ? mask_codec::empty : mask_codec::coded)
            : tensor.has_parameters ? _ == mask_codec::full and nnz == elements
            : nnz == 0 ? _ == mask_codec::empty
            : nnz == elements ? _ == mask_codec::full
            : _ == mask_codec::bitmask or _ == mask_codec::gap8 or _ == mask_codec::gap16
              or _ == mask_codec::learned
          # C-CODEC
        doc: |
          Empty exactly where nnz is 0, full exactly where all elements are kept, but for the value
          codecs that have parameters.
        doc-ref: 'format_spec/SPEC.md, section 5: Mask codecs'
      - id: check_full
        size: 0
        valid:
          expr: tensor.op != op::new or mask_codec == mask_codec::full  # C-NEW
      - id: mask_compressed
        type: u1
        valid:
          max: 'mask_codec == mask_codec::coded or mask_codec == mask_codec::learned ? 0 : 1'
          # C-FLAGS
        doc: 1 where the mask is a zstd frame.
      - id: planes_compressed
        type: u1
        valid:
          max: 'tensor.has_bits or tensor.is_coded_ulp ? 0 : (1 << planes) - 1'  # C-FLAGS
        doc: Bit i is 1 where plane i is a zstd frame.
      - id: reserved
        contents: [0]  # C-FLAGS
      - id: check_mask_raw_bytes
        size: 0
        valid:
          expr: |
            is_parameters
            ? (tensor.is_signs ? mask_raw_bytes >= exponents + 32
                                 and mask_raw_bytes <= exponents + 16 + 16 * 64
                                 and (mask_raw_bytes - exponents) % 16 == 0
               : tensor.is_grid ? mask_raw_bytes == exponents + 16
                                : mask_raw_bytes == 2)
            : mask_codec == mask_codec::bitmask ? mask_raw_bytes == (elements + 7) / 8
            : mask_codec == mask_codec::gap8 ? mask_raw_bytes >= nnz
                                               and mask_raw_bytes <= nnz + (elements - nnz) / 255
            : mask_codec == mask_codec::gap16
              ? mask_raw_bytes % 2 == 0 and mask_raw_bytes >= 2 * nnz
                and mask_raw_bytes <= 2 * (nnz + (elements - nnz) / 65535)
            : mask_codec == mask_codec::coded
              ? mask_raw_bytes % 4 == 0 and mask_raw_bytes >= 8
                and mask_raw_bytes <= 8 + 60 * elements
            : mask_codec == mask_codec::learned
              ? mask_raw_bytes % 4 == 0 and mask_raw_bytes >= 8
                and mask_raw_bytes <= 8 + 4 * elements
            : mask_raw_bytes == 0
          # C-MASKSIZE
      - id: check_mask_stored_bytes
        size: 0
        valid:
          expr: |
            mask_compressed == 0 ? mask_stored_bytes == mask_raw_bytes
            : mask_stored_bytes < mask_raw_bytes and mask_stored_bytes * 32768 >= mask_raw_bytes
          # C-STORED
      - id: plane_stored_bytes
        type: u4
        repeat: expr
        repeat-expr: 8
        valid:
          expr: |
            _index >= planes ? _ == 0
            : tensor.is_coded_ulp ? (nnz == 0 ? _ == 0
                                     : _index == 0 ? _ >= 22 and _ <= 8401 + 2 * nnz
                                     : _ <= (nnz * (8 * tensor.width - 2) + 7) / 8)
            : ((planes_compressed >> _index) & 1) == 0 ? _ == plane_raw_bytes
            : _ < plane_raw_bytes and _ * 32768 >= plane_raw_bytes
          # C-STORED
        doc: Those from the number of planes on are 0.
      - id: digest64
        size: 8
        doc: |
          First 8 bytes of BLAKE3 of the chunk's stored bytes without padding. Not checked here.
      - id: check_end_raw_bytes
        size: 0
        valid:
          expr: end_raw_bytes <= 256 * (_root.footer.index_offset - 64) + 67108864  # C-EXPANSION
    instances:
      is_parameters:
        value: tensor.has_parameters and number == 0
        doc: The mask stream holds parameters; there are no elements and no planes.
      elements_from_here:
        value: tensor.shape.elements - (number - tensor.parameter_chunks) * tensor.chunk_elements
      elements:
        value: |
          is_parameters ? 0
          : elements_from_here < tensor.chunk_elements ? elements_from_here : tensor.chunk_elements
        doc: Number of elements of the chunk.
      exponents:
        value: 2 * (tensor.rows + tensor.columns)
        doc: Number of exponents among the parameters of signs or of a grid, of one byte each.
      planes:
        value: |
          is_parameters ? 0 : tensor.has_parameters ? 1 : tensor.is_coded_ulp ? 2 : tensor.width
        doc: Number of planes; those from here to the dtype's width on are empty.
      plane_raw_bytes:
        value: 'tensor.has_bits ? (nnz + 7) / 8 : nnz'
        doc: Not of coded distances.
      planes_raw_bytes:
        value: |
          tensor.is_coded_ulp ? plane_stored_bytes[0] + plane_stored_bytes[1]
          : planes * plane_raw_bytes
      has_distances:
        value: tensor.is_coded_ulp and nnz > 0
      most_contexts:
        value: 'plane_stored_bytes[0] < 337 ? (plane_stored_bytes[0] - 17) / 5 : 64'
        doc: Contexts of distances for which plane 0 may have room.
      work:
        value: |
          (mask_codec == mask_codec::drawn ? elements / 32
           : mask_codec == mask_codec::coded ? elements / 4 + 4 * nnz
           : mask_codec == mask_codec::learned ? elements / 4
           : 0) + (has_distances ? 512 * most_contexts + nnz * tensor.width : 0)
        doc: |
          What finding out which elements are kept, or how large their distances are, counts as, in
          bytes.
      end_raw_bytes:
        value: raw_bytes + mask_raw_bytes + planes_raw_bytes + work

  heap:
    doc: |
      The names of all base, tensor and file records, in that order, without separators. Within each
      table names ascend strictly by their bytes.
    doc-ref: 'format_spec/SPEC.md, section 3.6: Heap and metadata'
    seq:
      - id: base_names
        type: name
        size: _parent.base_records[_index].name_bytes
        repeat: expr
        repeat-expr: _parent.base_records.size
        valid:
          expr: _index == 0 or _.bytes > base_names[_index - 1].bytes  # N-ORDER
      - id: tensor_names
        type: name
        size: _parent.tensor_records[_index].name_bytes
        repeat: expr
        repeat-expr: _parent.tensor_records.size
        valid:
          expr: _index == 0 or _.bytes > tensor_names[_index - 1].bytes  # N-ORDER
      - id: file_names
        type: file_name
        size: _parent.file_records[_index].name_bytes
        repeat: expr
        repeat-expr: _parent.file_records.size
        valid:
          expr: _index == 0 or _.bytes > file_names[_index - 1].bytes  # N-ORDER
      - id: check_end
        size: 0
        valid:
          expr: _io.eof  # N-HEAP; where names are longer than the heap, it has ended before

  name:
    doc: |
      A tensor's name: 1 to 512 bytes of UTF-8 without control characters. `octets` are read for the
      sake of their check, `bytes` to compare names by their bytes in languages that do not compare
      strings by code points.
    doc-ref: 'format_spec/SPEC.md, section 3.6: Heap and metadata'
    seq:
      - id: octets
        type: u1
        repeat: eos
        valid:
          expr: |
            _ >= 0x20 and _ != 0x7f
            and (_index == 0 or octets[_index - 1] != 0xc2 or _ >= 0xa0)
          # N-CONTROL; U+0080 to U+009F are C2 80 to C2 9F
      - id: check_text
        size: 0
        valid:
          expr: text != "__metadata__"  # N-UTF8, because `text` is decoded for it; N-RESERVED
    instances:
      bytes:
        pos: 0
        size-eos: true
      text:
        pos: 0
        size-eos: true
        type: str

  file_name:
    doc: A file's name, of the form `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`. Never a path.
    doc-ref: 'format_spec/SPEC.md, section 3.4: File record'
    seq:
      - id: octets
        type: u1
        repeat: eos
        valid:
          expr: |
            (_ >= 0x30 and _ <= 0x39) or (_ >= 0x41 and _ <= 0x5a) or (_ >= 0x61 and _ <= 0x7a)
            or (_index > 0 and (_ == 0x2d or _ == 0x2e or _ == 0x5f))
          # N-FILE
    instances:
      bytes:
        pos: 0
        size-eos: true
      text:
        pos: 0
        size-eos: true
        type: str
        encoding: ASCII

  chunk_data:
    doc: Nothing else lies between header and index.
    doc-ref: 'format_spec/SPEC.md, section 2.2: Chunk data'
    seq:
      - id: tensors
        type: chunks(_root.index.tensor_chunks[_index])
        repeat: expr
        repeat-expr: _root.index.tensor_chunks.size
      - id: files
        type: chunks(_root.index.file_chunks[_index])
        repeat: expr
        repeat-expr: _root.index.file_chunks.size
      - id: check_end
        size: 0
        valid:
          expr: _io.eof  # C-LAYOUT; where the chunks go on, the chunk data have ended before

  chunks:
    doc: The chunks of one tensor or file.
    doc-ref: 'format_spec/SPEC.md, section 2.2: Chunk data'
    params:
      - id: records
        type: chunk_records
    seq:
      - id: chunks
        type: chunk(records.chunks[_index])
        repeat: expr
        repeat-expr: records.chunks.size

  chunk:
    doc: One chunk as it is stored.
    doc-ref: 'format_spec/SPEC.md, section 2.2: Chunk data'
    params:
      - id: record
        type: chunk_record
    seq:
      - id: mask
        size: record.mask_stored_bytes
        if: not record.is_parameters
        doc: Which elements are kept; a zstd frame where record.mask_compressed is 1.
        doc-ref: 'format_spec/SPEC.md, section 5: Mask codecs'
      - id: signs_raw
        size: record.mask_stored_bytes
        type: signs_parameters(record)
        if: record.is_parameters and record.tensor.is_signs and record.mask_compressed == 0
        doc: The parameters of signs where they are stored raw; use `signs`.
      - id: signs_zstd
        size: record.mask_stored_bytes
        process: nps_zstd(record.mask_raw_bytes)  # P-ZSTD
        type: signs_parameters(record)
        if: record.is_parameters and record.tensor.is_signs and record.mask_compressed == 1
        doc: The parameters of signs where they are stored as one zstd frame; use `signs`.
      - id: grid_raw
        size: record.mask_stored_bytes
        type: grid_parameters(record)
        if: record.is_parameters and record.tensor.is_grid and record.mask_compressed == 0
        doc: The parameters of a grid where they are stored raw; use `grid`.
      - id: grid_zstd
        size: record.mask_stored_bytes
        process: nps_zstd(record.mask_raw_bytes)  # P-ZSTD
        type: grid_parameters(record)
        if: record.is_parameters and record.tensor.is_grid and record.mask_compressed == 1
        doc: The parameters of a grid where they are stored as one zstd frame; use `grid`.
      - id: levels
        size: record.mask_stored_bytes
        type: levels_parameters
        if: record.is_parameters and not record.tensor.has_bits
      - id: tokens
        size: record.plane_stored_bytes[0]
        type: tokens(record)
        if: record.has_distances
        doc: Plane 0 of coded distances.
      - id: low_bits
        size: record.plane_stored_bytes[1]
        if: record.has_distances
        doc: Plane 1 of coded distances, the bits below those that tokens say.
      - id: planes
        size: record.plane_stored_bytes[_index]
        repeat: expr
        repeat-expr: 'record.tensor.is_coded_ulp ? 0 : record.tensor.width'
        doc: |
          Plane i holds byte i of the payload word of every kept element; it is a zstd frame where
          bit i of record.planes_compressed is 1. In signs and grids plane 0 holds a bit for every
          kept element, in levels a signed byte for every element; other planes are empty.
        doc-ref: 'format_spec/SPEC.md, section 6: Value codecs'
      - id: padding
        type: u1
        repeat: expr
        repeat-expr: (8 - _io.pos % 8) % 8
        valid: 0  # C-PADDING
        doc: Up to a multiple of 8, which the start of the chunk data is.
    instances:
      signs:
        value: 'record.mask_compressed == 0 ? signs_raw : signs_zstd'
        if: record.is_parameters and record.tensor.is_signs
      grid:
        value: 'record.mask_compressed == 0 ? grid_raw : grid_zstd'
        if: record.is_parameters and record.tensor.is_grid

  tokens:
    doc: |
      How often each token occurs, by the exponent of the base's word; then words of 16 bits, the
      first eight of which are the four states.
    doc-ref: 'format_spec/SPEC.md, section 6: Value codecs'
    params:
      - id: record
        type: chunk_record
    seq:
      - id: num_contexts
        type: u1
        valid:  # P-TABLE
          min: 1
          max: 64
      - id: contexts
        type: 'context(_index, _index == 0 ? 0 : contexts[_index - 1].first_exponent,
          16 * record.tensor.width)'
        repeat: expr
        repeat-expr: num_contexts
      - id: states
        type: u4
        repeat: expr
        repeat-expr: 4
      - id: words
        type: u2
        repeat: eos  # P-TABLE where half a word is left

  context:
    doc: Tokens of elements whose base word has an exponent from the first one to the next context's.
    doc-ref: 'format_spec/SPEC.md, section 6: Value codecs'
    params:
      - id: number
        type: u1
      - id: previous
        type: u1
        doc: The context before begins there.
      - id: end_tokens
        type: u2
        doc: Number of tokens that there are for the dtype.
    seq:
      - id: first_exponent
        type: u1
        valid:
          expr: 'number == 0 ? _ == 0 : _ > previous'  # P-TABLE
      - id: first_token
        type: u1
      - id: num_tokens
        type: u1
        valid:
          expr: _ >= 1 and first_token + _ <= end_tokens  # P-TABLE
      - id: shares
        type: 'share(first_token + _index, _index == 0 ? 0 : shares[_index - 1].end)'
        repeat: expr
        repeat-expr: num_tokens
      - id: check_shares
        size: 0
        valid:
          expr: shares.first.share > 0 and shares.last.share > 0 and shares.last.end == 4096
          # P-TABLE

  share:
    doc: How often a token occurs, of 4096 times.
    doc-ref: 'format_spec/SPEC.md, section 6: Value codecs'
    params:
      - id: token
        type: u1
      - id: start
        type: u4
        doc: Sum of the shares of the tokens before.
    seq:
      - id: share
        type: u2
        valid:
          expr: token != 1 or _ == 0  # P-TABLE
    instances:
      end:
        value: start + share

  signs_parameters:
    doc: |
      Which elements are drawn, and how large their changes are.
    doc-ref: 'format_spec/SPEC.md, section 6: Value codecs'
    params:
      - id: record
        type: chunk_record
    seq:
      - id: seed
        type: u8
      - id: gain
        type: f4
        valid:
          expr: _ <= 3.4028234663852886e+38  # P-PARAMETERS; no NaN is
      - id: check_gain
        size: 0
        valid:
          expr: gain_bits < 0x80000000  # P-PARAMETERS; -0.0 is refused too
      - id: num_subspaces
        type: u2
        valid: (record.mask_raw_bytes - 16 - record.exponents) / 16  # P-PARAMETERS
      - id: reserved
        contents: [0, 0]  # P-PARAMETERS
      - id: subspaces
        type: 'subspace(_index, _index == 0 ? -32768 : subspaces[_index - 1].first)'
        repeat: expr
        repeat-expr: num_subspaces
      - id: exponents
        type: exponents(record)
    instances:
      gain_bits:
        pos: 8
        type: u4

  subspace:
    doc: Elements whose exponents add up to `first` or more, but less than the next one's.
    doc-ref: 'format_spec/SPEC.md, section 6: Value codecs'
    params:
      - id: number
        type: u2
      - id: previous
        type: s2
        doc: The subspace before begins there.
    seq:
      - id: first
        type: s2
        valid:
          expr: 'number == 0 ? _ == -32768 : _ > previous'  # P-PARAMETERS
      - id: reserved
        contents: [0, 0]  # P-PARAMETERS
      - id: scale
        type: f4
        valid:
          expr: _ > 0 and _ <= 3.4028234663852886e+38  # P-PARAMETERS
      - id: rate
        type: f8
        valid:
          expr: _ > 0 and _ <= 1.7976931348623157e+308  # P-PARAMETERS

  grid_parameters:
    doc: What one step of a change is worth, and in which contexts magnitudes are coded.
    doc-ref: 'format_spec/SPEC.md, section 6: Value codecs'
    params:
      - id: record
        type: chunk_record
    seq:
      - id: step
        type: f8
        valid:
          expr: _ > 0 and _ <= 1.7976931348623157e+308  # P-PARAMETERS
      - id: first
        type: s2
        doc: The exponent, size and importance together, of the first of the 64 contexts.
      - id: reserved
        contents: [0, 0, 0, 0, 0, 0]  # P-PARAMETERS
      - id: exponents
        type: exponents(record)

  exponents:
    doc: |
      Of the rows and columns of a tensor. They are in half octaves: an exponent e stands for the
      factor 2^(e / 2).
    doc-ref: 'format_spec/SPEC.md, section 3.9: Chunks of signs, levels and grids'
    params:
      - id: record
        type: chunk_record
    seq:
      - id: size_rows
        type: s1
        repeat: expr
        repeat-expr: record.tensor.rows
        valid:
          expr: _ == -128 or (_ >= -60 and _ <= 60)  # P-PARAMETERS
        doc: Exponent of each row's size; -128 stands for the factor 0.
      - id: size_columns
        type: s1
        repeat: expr
        repeat-expr: record.tensor.columns
        valid:
          expr: _ == -128 or (_ >= -60 and _ <= 60)  # P-PARAMETERS
        doc: Exponent of each column's size; -128 stands for the factor 0.
      - id: importance_rows
        type: s1
        repeat: expr
        repeat-expr: record.tensor.rows
        valid:  # P-PARAMETERS
          min: -60
          max: 60
      - id: importance_columns
        type: s1
        repeat: expr
        repeat-expr: record.tensor.columns
        valid:  # P-PARAMETERS
          min: -60
          max: 60

  levels_parameters:
    doc: A change is a multiple of 2^(exponent / 2).
    doc-ref: 'format_spec/SPEC.md, section 6: Value codecs'
    seq:
      - id: exponent
        type: s2
        valid:  # P-PARAMETERS
          min: -120
          max: 120

enums:
  index_compression:
    0:
      id: raw
    1:
      id: zstd
      doc: One zstd frame.
    2:
      id: zstd_dictionary
      doc: One zstd frame with a dictionary that is in another file.
  dtype:
    1: bool
    2: u8
    3: i8
    4: u16
    5: i16
    6: u32
    7: i32
    8: u64
    9: i64
    10: f8_e4m3
    11: f8_e5m2
    12: f8_e8m0
    13: f16
    14: bf16
    15: f32
    16: f64
    17: c64
  op:
    1:
      id: copy
      doc: The base tensor's bytes under this name, or the base's file of that name.
    2:
      id: delta
      doc: The base tensor with its kept elements changed.
    3:
      id: new
      doc: Stored whole.
  mask_codec:
    0:
      id: empty
      doc: Nothing is kept.
    1:
      id: full
      doc: Everything is kept.
    2:
      id: bitmask
      doc: One bit an element.
    3:
      id: gap8
      doc: One byte a gap; 255 skips 255 elements, keeps none, and the gap goes on.
    4:
      id: gap16
      doc: As gap8 with 16-bit gaps and 65535; all low bytes, then all high bytes.
    7:
      id: drawn
      doc: What the parameters of signs draw at random is kept; there is no stream.
    8:
      id: parameters
      doc: No mask, but the parameters of signs, levels or a grid.
    9:
      id: coded
      doc: What has a magnitude other than 0 is kept; the stream is arithmetic-coded.
    10:
      id: learned
      doc: A decision for each element, by how often its row and column were kept before.
  value_codec:
    0:
      id: none
      doc: Copies.
    1:
      id: replace
      doc: The payload is the fine-tune's word.
    2:
      id: xor
      doc: The payload is the xor of the base's word and the fine-tune's.
    3:
      id: ulp
      doc: The payload is the distance in floats, as a zigzag number less 1.
    4:
      id: coded_ulp
      doc: The same payload, coded by how often it occurs beside the base's exponent.
    16:
      id: signs
      doc: What is drawn changes by a size that the parameters imply; the payload is the sign.
    17:
      id: levels
      doc: The payload is a multiple of one step, as a signed byte.
    18:
      id: grid
      doc: The payload is a multiple of the step of its place, as a coded magnitude and a sign.
