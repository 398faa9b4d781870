/* Byte arithmetic on 32 codes at once, in the compilers' portable vector types, and small readers. */
#pragma once
#include <stdint.h>
#include <string.h>

namespace {

#define INLINE inline __attribute__((always_inline))

typedef uint8_t u8x32 __attribute__((vector_size(32)));
typedef int8_t i8x32 __attribute__((vector_size(32)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

template <class T> INLINE T read(const void *from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}

INLINE u8x32 load32(const uint8_t *from) { return read<u8x32>(from); }

/* Bits [shift, shift + width) of every byte. Bytes have no shift of their own: words are shifted and masked. */
INLINE u8x32 field(u8x32 bytes, int shift, uint8_t mask) { return (u8x32)((u16x16)bytes >> shift) & (u8x32{} + mask); }

INLINE u8x32 up(u8x32 bytes, int shift) { return (u8x32)((u16x16)bytes << shift); } /* no bit may leave its byte */

INLINE i8x32 minus(u8x32 bytes, int8_t what) { return (i8x32)bytes - (i8x32{} + what); }

INLINE float bits_to_float(uint32_t bits) { return read<float>(&bits); }

INLINE uint32_t float_to_bits(float value) { return read<uint32_t>(&value); }

/* IEEE half to float, exact for every finite value: normal ones by moving the exponent, subnormal ones by a
   subtraction that normalises them. */
INLINE float half_bits_to_float(uint16_t half) {
  const uint32_t wide = (uint32_t)half << 16, sign = wide & 0x80000000u, twice = wide + wide;
  const float normal = bits_to_float((twice >> 4) + (0xE0u << 23)) * bits_to_float(0x07800000u); /* * 2^-112 */
  const float subnormal = bits_to_float((twice >> 17) | (126u << 23)) - 0.5f;
  return bits_to_float(sign | float_to_bits(twice < (1u << 27) ? subnormal : normal));
}

/* Round to nearest even, as torch does; the value is finite. */
INLINE uint16_t to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

} // namespace
