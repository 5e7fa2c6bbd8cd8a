// ollama for JavaScript, against the server that SERVER names.
const assert = require('node:assert/strict')
const test = require('node:test')
const { Ollama } = require('ollama')

const { call, functions, near, say, user, COLOURS } = require('./says.cjs')

const client = new Ollama({ host: process.env.SERVER })

test('chat', async () => {
  const answer = await client.chat({ model: 'one', messages: user('Hello, you.') })
  assert.equal(answer.message.content, 'Hello, you.')
  assert.equal(answer.done_reason, 'stop')
  assert.equal(answer.eval_count, 'Hello, you.'.length)
})

test('streams', async () => {
  let text = ''
  let last
  for await (const part of await client.chat({ model: 'one', messages: user('Grüße'), stream: true })) {
    text += part.message.content
    last = part
  }
  assert.equal(text, 'Grüße')
  assert.ok(last.done && last.total_duration > 0)
  text = ''
  for await (const part of await client.generate({ model: 'one', prompt: say('abc'), stream: true })) {
    text += part.response
  }
  assert.equal(text, 'abc')
})

test('tools', async () => {
  const messages = user(call('weather', { city: 'Oslo' }) + call('clock', {}))
  const answer = await client.chat({ model: 'one', messages, tools: functions })
  const calls = answer.message.tool_calls.map((call) => [call.function.name, call.function.arguments])
  assert.deepEqual(calls, [['weather', { city: 'Oslo' }], ['clock', {}]])
  messages.push(answer.message, { role: 'tool', tool_name: 'weather', content: say('It rains.') })
  const more = await client.chat({ model: 'one', messages, tools: functions })
  assert.equal(more.message.content, 'It rains.')
})

test('forms', async () => {
  const answer = await client.chat({ model: 'one', messages: user('No.'), format: COLOURS })
  assert.deepEqual(Object.keys(JSON.parse(answer.message.content)), ['sky', 'rains'])
})

test('thinking', async () => {
  const messages = user('<think>\nWell.\n</think>\n\nYes.')
  const { message } = await client.chat({ model: 'one', messages, think: true })
  assert.equal(message.thinking.trim(), 'Well.')
  assert.equal(message.content, 'Yes.')
})

test('embeddings', async () => {
  const { embeddings } = await client.embed({ model: 'one', input: ['aei', 'oo'] })
  near(embeddings[0], [1, 1, 1, 0, 0])
  near(embeddings[1], [0, 0, 0, 1, 0])
})

test('models', async () => {
  const names = (list) => list.models.map((model) => model.model).sort()
  assert.deepEqual(names(await client.list()), ['fill', 'one', 'plain', 'two'])
  assert.deepEqual((await client.show({ model: 'plain' })).capabilities, ['completion'])
  assert.match((await client.version()).version, /^\d+\.\d+/)
  await client.generate({ model: 'two', prompt: '' })
  assert.ok(names(await client.ps()).includes('two'))
  assert.equal((await client.generate({ model: 'two', prompt: '', keep_alive: 0 })).done_reason, 'unload')
  assert.ok(!names(await client.ps()).includes('two'))
})

test('errors', async () => {
  const refused = (status, ask) => assert.rejects(ask, (error) => error.status_code === status)
  await refused(404, client.chat({ model: 'three', messages: user('x') }))
  await refused(400, client.chat({ model: 'one', messages: user('x'), options: { temperature: -1 } }))
  await refused(400, client.generate({ model: 'one', prompt: 'x', images: ['AA=='] }))
  await refused(501, client.delete({ model: 'one' }))
  const stream = await client.chat({ model: 'one', messages: user('abc FAIL~ NOW'), stream: true })
  await assert.rejects(async () => {
    for await (const part of stream) assert.ok(part)
  }, /the script says so/)
})
