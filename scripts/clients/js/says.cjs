// What scripted models are told to say.
const assert = require('node:assert/strict')

const say = (text) => `SAY[${text}]YAS`
const tool = (name, parameters) => ({ type: 'function', function: { name, description: name, parameters } })
const CITY = {
  type: 'object',
  properties: { city: { type: 'string' } },
  required: ['city'],
  additionalProperties: false,
}

module.exports = {
  say,
  user: (text) => [{ role: 'user', content: say(text) }],
  call: (name, given) => `<tool_call>\n${JSON.stringify({ name, arguments: given })}\n</tool_call>`,
  functions: [
    tool('weather', CITY),
    tool('clock', { type: 'object', properties: {}, additionalProperties: false }),
  ],
  COLOURS: {
    type: 'object',
    properties: { sky: { enum: ['blue', 'grey'] }, rains: { type: 'boolean' } },
    required: ['sky', 'rains'],
    additionalProperties: false,
  },
  // Whether this is the embedding of a text with so many of each vowel.
  near(embedding, counts) {
    const length = Math.hypot(...counts)
    assert.equal(embedding.length, counts.length)
    embedding.forEach((x, i) => assert.ok(Math.abs(x - counts[i] / length) < 1e-6))
  },
}
